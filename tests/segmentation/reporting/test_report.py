import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from segmentation.data.images import mask_image, resize_mask
from segmentation.data.voc import VocFolder
from segmentation.errors import PipelineError
from segmentation.files import write_json
from segmentation.reporting.figures import Drawn, draw_confusion, draw_panels, draw_per_class, draw_reliability
from segmentation.reporting.report import _setting, _table, write_report
from segmentation.settings import load_settings
from tests.conftest import contrast

HOSTILE = '<b>cat & "dog"</b>'
CLASSES = ["background", HOSTILE, "NA"]  # the last one is in no photo, and its name is text
IDS = ["001", "null"]
CONFUSION = np.array([[3000, 200, 0], [100, 500, 0], [0, 0, 0]])
SHA = "0123456789abcdef" * 4


@dataclasses.dataclass(frozen=True)
class Inputs:
    root: Path
    settings: object

    def write(self, name="index.html"):
        path = self.root / name
        write_report(
            path,
            self.root / "training",
            self.root / "evaluation",
            self.root / "data_checks.json",
            self.root / "models",
            self.root / "raw",
            self.settings,
        )
        return path


def write_inputs(root, settings):
    evaluation, folder = root / "evaluation", VocFolder(root / "raw")
    evaluation.mkdir(parents=True)
    generator = np.random.default_rng(0)
    truth = np.zeros((50, 76), np.uint8)
    truth[10:30, 10:40], truth[:2] = 1, 255
    prediction = np.roll(truth, 3, axis=1)
    prediction[prediction == 255] = 0
    photo = Image.fromarray(generator.integers(0, 256, (50, 76, 3), dtype=np.uint8))
    for number, identifier in enumerate(IDS, 1):
        for path, picture in ((folder.photo(identifier), photo), (folder.mask(identifier), mask_image(truth))):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                picture.save(stream, "JPEG" if path.suffix == ".jpg" else "PNG")
        for epoch in (1, 12):
            path = root / f"training/panels/epoch_{epoch:02d}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask_image(resize_mask(prediction, 56)).save(path)
    pd.DataFrame(
        {
            "epoch": [1, 2],
            "train_loss": [0.9, 0.8],
            "val_accuracy": [0.71, 0.7234],
            "val_report_miou": [0.1, 0.11],
            "val_miou": [0.3, 0.4],
        }
    ).to_csv(root / "training/history.csv", index=False)
    per_class = pd.DataFrame(
        {
            "id": range(3),
            "class": CLASSES,
            "iou": [0.91, 0.625, np.nan],
            "iou_low": [0.8, 0.5, np.nan],
            "iou_high": [0.95, 0.7, np.nan],
            "boundary_iou": [0.5, 0.4, np.nan],
            "pixels": [3200, 600, 0],
            "frequency": [0.842, 0.158, 0],
            "photos": [2, 2, 0],
        }
    )
    reliability = pd.DataFrame(
        {
            "low": [0, 0.5],
            "high": [0.5, 1],
            "pixels": [0, 3800],
            "confidence": [np.nan, 0.96],
            "accuracy": [np.nan, 0.921],
        }
    )
    per_class.to_csv(evaluation / "per_class.csv", index=False)
    reliability.to_csv(evaluation / "reliability.csv", index=False)
    pd.DataFrame({"id": IDS, "width": 76, "height": 50, "miou": [0.7, 0.8], "pixel_accuracy": [0.9, 0.95]}).to_csv(
        evaluation / "per_image.csv", index=False
    )
    np.savez_compressed(
        evaluation / "per_image_confusion.npz", ids=np.array(IDS), confusion=CONFUSION[None].astype(np.uint32)
    )
    write_json(
        evaluation / "metrics.json",
        {
            "miou": 0.7675,
            "miou_low": 0.6512,
            "miou_high": 0.8231,
            "interval": "95 % interval 0.6512 to 0.8231",
            "pixel_accuracy": 0.9211,
            "classes_shown": 2,
            "background_everywhere": {"miou": 0.4211, "pixel_accuracy": 0.8421, "mean_class_accuracy": 0.5},
            "mean_class_accuracy": 0.8854,  # boundary IoU is undefined, and left out
            "calibration_error": 0.0391,
            "training_size": {"miou": 0.75, "pixel_accuracy": 0.9, "report_miou": 0.4, "report_miou_ceiling": 0.5},
            "photos": 2,
        },
    )
    rows = [Drawn(identifier, photo, truth, prediction) for identifier in IDS]
    for name in ("panels", "worst", "best"):
        draw_panels(evaluation / f"{name}.png", rows, CLASSES)
    draw_confusion(evaluation / "confusion.png", CONFUSION, CLASSES)
    draw_per_class(evaluation / "per_class.png", per_class)
    draw_reliability(evaluation / "reliability.png", reliability, 0.0391)
    rule = {"rule": "a", "says": "no <u>rule</u>", "severity": "critical", "passed": True, "offenders": 0}
    broken = {"rule": "b", "says": "every photo named .jpg is a JPEG", "severity": "warning", "passed": False}
    offender = {"file": "JPEGImages/" + "x" * 200 + ".jpg", "found": "a <s>PNG</s>"}
    write_json(
        root / "data_checks.json",
        {
            "result": "passed with warnings",
            "splits": {"train": {"pairs": 4, "sha256": SHA}, "val": {"pairs": 2, "sha256": SHA[::-1]}},
            "rules": [
                rule | {"first_offenders": []},
                broken | {"offenders": 23, "first_offenders": [offender]},
            ],
        },
    )
    write_json(
        root / "models/segmenter.json",
        {
            "encoder": "vit_small_patch14_dinov2",
            "decoder": "unet",
            "image_size": 56,
            "classes": CLASSES,
            "encoder_weights": f"dinov2_vits14.pth (sha256 {SHA})",
            "epoch": 2,
            "weights_sha256": SHA,
        },
    )
    return Inputs(root, settings)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, root):
    settings = load_settings(root / "params.yaml", {"fetch.archive": "/home/somebody/voc.tar", "train.epochs": 2})
    return write_inputs(tmp_path_factory.mktemp("report"), settings)


@pytest.fixture(scope="module")
def opened(inputs, browser):
    """The page as a browser shows it, and all that the browser had to say or to fetch."""
    path = inputs.write()
    page, said, fetched = browser.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(path.as_uri())
    yield page, said, [url for url in fetched if not url.startswith("data:") and url != path.as_uri()]
    page.close()


def test_the_page_needs_nothing_else_and_says_nothing(opened):
    page, said, fetched = opened
    page.wait_for_load_state("networkidle")
    assert said == []
    assert fetched == []


def test_every_picture_is_there_and_described(opened):
    page, _, _ = opened
    pictures = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.width, i.alt.trim()])")
    assert len(pictures) == 7 + 2 * 4
    assert all(all(picture) for picture in pictures)
    declared = page.evaluate("[...document.images].map(i => [+i.getAttribute('width'), +i.getAttribute('height')])")
    assert declared == [picture[:2] for picture in pictures]


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_never_scrolls_sideways(opened, width, scheme):
    page, _, _ = opened
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.body.scrollWidth") <= width


def test_text_can_be_read_in_light_and_dark(opened):
    page, _, _ = opened
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for selector in ("body", ".lead", "a", "td.good", "td.warn", "thead th.theirs"):
            text, ground = page.evaluate(
                """selector => {
                    const box = document.querySelector(selector), grounds = [];
                    for (let e = box; e; e = e.parentElement) grounds.push(getComputedStyle(e).backgroundColor);
                    return [getComputedStyle(box).color, grounds.find(g => g !== 'rgba(0, 0, 0, 0)')];
                }""",
                selector,
            )
            assert contrast(text, ground) >= 4.5, (scheme, selector)


def test_the_structure_is_that_of_a_document(opened):
    page, _, _ = opened
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"
    assert "0.7675" in page.title()
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.tagName)")]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.locator("table").count() == page.locator("table > caption").count()
    assert page.locator("th:not([scope])").count() == 0
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert targets == page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)")
    assert page.evaluate("document.querySelectorAll('[id]').length") == page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
    )


def test_names_of_the_user_are_text(opened):
    page, _, _ = opened
    text = page.inner_text("body")
    for shown in (HOSTILE, "no <u>rule</u>", "a <s>PNG</s>"):
        assert shown in text
    assert page.locator("u, s, script").count() == 0
    assert page.get_by_role("rowheader", name=HOSTILE, exact=True).count() == 1
    for name in ("NA", *IDS):
        assert page.get_by_role("rowheader", name=name, exact=True).count() == 1


def test_the_numbers_are_those_of_the_files(opened):
    page, _, _ = opened
    text = " ".join(page.inner_text("body").split())
    for shown in (
        "mIoU 0.7675 95 % interval 0.6512 to 0.8231",
        "Pixel accuracy 0.9211",
        "Boundary IoU –",
        "This model reaches 80.0 % of it.",
        "the ceiling is 0.1806, so the report’s 0.1373 is 76 % of it",
        "2 (kept) 0.8000 0.5166 0.7234 0.8150 0.1100 0.1073 0.4000",
        "8 – 0.2659 – 0.9368 – 0.1373 –",
        f"16.7 % of {HOSTILE} is taken for background (100 pixels)",
        "6.2 % of background is taken for",
        "the model is 96.0 % sure of its answer and right in 92.1 % of them: it is surer than it should be",
        "passed with warnings: 4 pairs in train, 2 pairs in val",
        "and 22 more",
        "archive …/voc.tar",
        "epochs 2",
        f"weights_sha256 {SHA[:12]}",
    ):
        assert shown in text
    assert "somebody" not in page.content()
    assert SHA in page.content()
    heads = page.locator(".panels thead th").all_inner_texts()
    assert heads == ["Photo", "Truth", "After epoch 1", "After epoch 12"]


def test_the_page_prints(opened):
    page, _, _ = opened
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_writing_twice_gives_the_same_bytes(inputs):
    first, curves = inputs.write("one.html").read_bytes(), (inputs.root / "evaluation/curves.png").read_bytes()
    assert inputs.write("two.html").read_bytes() == first
    assert (inputs.root / "evaluation/curves.png").read_bytes() == curves
    assert str(inputs.root).encode() not in first


def test_a_miou_of_one_class_alone_says_so_and_others_do_not(inputs, tmp_path):
    shutil.copytree(inputs.root, tmp_path / "copy")
    copy = dataclasses.replace(inputs, root=tmp_path / "copy")
    words = "This mIoU is of one class alone"
    assert words not in copy.write().read_text()
    metrics = json.loads((copy.root / "evaluation/metrics.json").read_text())
    write_json(copy.root / "evaluation/metrics.json", metrics | {"miou": 1.0, "classes_shown": 1})
    assert words in copy.write().read_text()


def test_background_everywhere_is_shown_where_it_was_scored(inputs, tmp_path):
    shutil.copytree(inputs.root, tmp_path / "copy")
    copy = dataclasses.replace(inputs, root=tmp_path / "copy")
    page = " ".join(copy.write().read_text().split())
    assert "“background everywhere” has a mIoU of 0.4211 and a pixel accuracy of 0.8421 on these photos" in page
    metrics = json.loads((copy.root / "evaluation/metrics.json").read_text())
    del metrics["background_everywhere"]  # no class is a background
    write_json(copy.root / "evaluation/metrics.json", metrics)
    assert "everywhere" not in copy.write().read_text()


def test_a_run_without_panels_of_epochs_says_so(inputs, tmp_path):
    shutil.copytree(inputs.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "training/panels")
    page = dataclasses.replace(inputs, root=tmp_path).write().read_text()
    assert "None was kept" in page


@pytest.mark.parametrize(
    "name",
    [
        "training/history.csv",
        "evaluation/metrics.json",
        "evaluation/worst.png",
        "data_checks.json",
        "raw/JPEGImages/001.jpg",
    ],
)
def test_a_missing_file_is_named_with_the_remedy(inputs, tmp_path, name):
    shutil.copytree(inputs.root, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(PipelineError, match=rf"{name}: not found.*`dvc repro`"):
        dataclasses.replace(inputs, root=tmp_path).write()


def test_too_few_photos_for_an_interval_are_said(inputs, tmp_path):
    shutil.copytree(inputs.root, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "evaluation/metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["miou_low"], metrics["miou_high"]
    write_json(file, metrics | {"interval": "2 photos are too few for a 95 % interval, it takes 20"})
    page = " ".join(dataclasses.replace(inputs, root=tmp_path).write().read_text().split())
    assert "<strong>0.7675</strong> 2 photos are too few for a 95 % interval, it takes 20" in page


def test_the_worst_photos_are_listed_by_their_wrong_pixels(opened):
    page, _, _ = opened
    rows = page.locator("#photos tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["NA", "001"] if IDS[0] == "NA" else rows
    assert "10.0" in rows[0] and "5.0" in rows[1]


def test_of_an_absolute_path_the_last_part_is_shown():
    assert _setting("/home/me/voc.tar") == "…/voc.tar"
    assert _setting(r"C:\me\voc.tar") == "…/voc.tar"
    assert _setting("data/own") == "data/own"
    assert _setting("http://somewhere/voc.tar") == "http://somewhere/voc.tar"
    assert [_setting(value) for value in (None, True, 1e-4, [8, 5])] == ["null", "true", "0.0001", "[8, 5]"]


def test_names_in_tables_are_text_and_gaps_are_not_numbers(tmp_path):
    (tmp_path / "t.csv").write_text("id,miou\n001,0.5\nnan,\n")
    table = _table(tmp_path / "t.csv", "id")
    assert table["id"].tolist() == ["001", "nan"]
    assert table["miou"].isna().tolist() == [False, True]


def test_the_reports_own_numbers_are_those_of_the_design():
    from segmentation.reporting.report import REPORT_CEILING, REPORT_EPOCHS, REPORT_MIOU

    assert REPORT_EPOCHS["val_report_miou"].iloc[-1] == REPORT_MIOU
    assert json.dumps(REPORT_EPOCHS["epoch"].tolist()) == "[1, 2, 3, 4, 5, 6, 7, 8]"
    assert round(100 * REPORT_MIOU / REPORT_CEILING) == 76
