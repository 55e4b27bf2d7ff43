"""The page in headless Chromium, as a person uses it."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from serving.limits import MAX_BYTES
from tests.conftest import contrast
from tests.serving.conftest import mask_png, photo


@pytest.fixture
def page(browser, server):
    """The page; it has nothing to say on the console and fetches nothing from elsewhere."""
    page, said, fetched = browser.new_page(viewport={"width": 1280, "height": 800}), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.said = said
    page.goto(server.url)
    page.wait_for_selector("footer:has-text('version')")
    yield page
    page.close()
    assert said == []
    assert [url for url in fetched if not url.startswith((server.url, f"blob:{server.url}", "data:"))] == []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A drawn photo, held upright by the camera's own note: 64 by 91 pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path_factory.mktemp("photos") / "a <b>photo.jpg"
    path.write_bytes(photo(91, 64, 1, exif=exif))
    return path


def choose(page, path: Path) -> None:
    page.set_input_files("#file", path)
    page.wait_for_selector("#about", state="visible")


def pixels(page, selector: str = "#stack") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def overlay(page) -> np.ndarray:
    """What the mask's canvas holds, `[H, W, 4]`."""
    url = page.evaluate("document.getElementById('mask').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def overlaid(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The class ids of a mask, and what is to be drawn of it: its colours `[H, W, 4]`, background left clear."""
    ids = np.asarray(Image.open(io.BytesIO(png)))
    colours = np.array(Image.open(io.BytesIO(png)).convert("RGBA"))
    colours[ids == 0] = 0
    return ids, colours


def test_the_mask_lies_over_an_upright_photo(page, drawn):
    choose(page, drawn)
    sizes = page.evaluate(
        """["photo", "mask", "lines"].map(id => {
            const box = document.getElementById(id).getBoundingClientRect();
            return [box.x, box.y, box.width, box.height].map(Math.round);
        })"""
    )
    assert sizes[0] == sizes[1] == sizes[2]
    assert abs(sizes[0][2] / sizes[0][3] - 64 / 91) < 0.01
    assert page.evaluate("[document.getElementById('mask').width, document.getElementById('mask').height]") == [64, 91]
    assert page.inner_text("#said") == f"{drawn.name}, 64 × 91 pixels"
    assert "version 1 (champion)" in page.inner_text("footer")


def test_what_is_drawn_and_downloaded_is_the_mask(page, store, drawn):
    choose(page, drawn)
    expected = mask_png(store.predictor("1"), drawn.read_bytes())
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == expected
    assert download.value.suggested_filename.endswith("_mask.png")
    mask, colours = overlaid(expected)
    assert np.array_equal(overlay(page), colours)
    rows = page.locator("#legend tr").all_inner_texts()
    assert len(rows) == len(np.unique(mask))
    assert f"background\t{100 * (mask == 0).mean():.1f} %" in rows


def test_opacity_and_outlines_change_what_is_seen(page, drawn):
    choose(page, drawn)
    seen = {}
    page.uncheck("#outline")
    for opacity in (0, 50, 100):
        page.fill("#opacity", str(opacity))
        assert page.inner_text("#percent") == f"{opacity} %"
        seen[opacity] = pixels(page)
    half = (seen[0] + seen[100]) / 2
    assert np.abs(seen[100] - seen[0]).max() > 50
    assert np.abs(seen[50] - half).max() <= 3
    page.check("#outline")
    assert (pixels(page) == 255).all(2).sum() > (seen[100] == 255).all(2).sum()


def test_all_of_it_works_by_keyboard(page, drawn):
    # the browser is told to hand over file choosers without waiting for its answer: tell it before the key is pressed
    page.on("filechooser", lambda _: None)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    assert page.evaluate("getComputedStyle(document.querySelector('.drop')).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(drawn)
    page.wait_for_selector("#about", state="visible")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "opacity"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#percent") == "61 %"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.locator("#lines").is_hidden()
    page.keyboard.press("Tab")
    with page.expect_download():
        page.keyboard.press("Enter")


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_photo_is_dropped_or_pasted(page, drawn, how):
    page.evaluate(
        """([how, bytes]) => {
            const data = new DataTransfer(), init = {bubbles: true, cancelable: true};
            data.items.add(new File([new Uint8Array(bytes)], "given.jpg"));
            dispatchEvent(how === "drop" ? new DragEvent(how, {...init, dataTransfer: data})
                                         : new ClipboardEvent(how, {...init, clipboardData: data}));
        }""",
        [how, list(drawn.read_bytes())],
    )
    page.wait_for_selector("#about", state="visible")
    assert page.inner_text("#said").startswith("given.jpg")


def test_a_file_that_is_no_photo_is_told_in_words_and_the_next_is_served(page, drawn, tmp_path):
    choose(page, drawn)
    text = tmp_path / "notes.txt"
    text.write_text("a dog")
    page.set_input_files("#file", text)
    page.wait_for_selector("#wrong", state="visible")
    assert page.inner_text("[role=alert]") == "notes.txt: this is neither a JPEG nor a PNG photo"
    assert page.locator("#work").is_hidden()
    choose(page, drawn)
    assert page.locator("#wrong").is_hidden()
    assert len(page.said) == 1 and "415" in page.said.pop()  # the browser's own line for a refused request


def test_a_server_that_is_away_is_told_in_words(page, drawn):
    page.route("**/segment", lambda route: route.abort())
    page.set_input_files("#file", drawn)
    page.wait_for_selector("#wrong", state="visible")
    assert "does not answer" in page.inner_text("#wrong")
    assert len(page.said) == 1 and "ERR_FAILED" in page.said.pop()


@pytest.fixture(scope="module")
def many_pixels(tmp_path_factory) -> Path:
    """A photo that the server refuses at once, and that a browser takes a while to decode: 30 million pixels."""
    path = tmp_path_factory.mktemp("photos") / "many.jpg"
    path.write_bytes(photo(6000, 5000, 4))
    return path


@pytest.fixture(scope="module")
def many_bytes(tmp_path_factory) -> Path:
    """A photo that browsers show, in more bytes than the server takes."""
    path = tmp_path_factory.mktemp("photos") / "heavy.jpg"
    path.write_bytes(photo(3000, 2000, 5) + bytes(MAX_BYTES))
    return path


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ("many_pixels", "many.jpg: this photo has 6000×5000 pixels; at most 25,000,000 are taken"),
        ("many_bytes", "heavy.jpg: the body is larger than 33,554,432 bytes"),
    ],
)
def test_a_refused_photo_is_not_shown_without_a_mask(page, drawn, request, refused, says):
    choose(page, drawn)
    page.set_input_files("#file", request.getfixturevalue(refused))
    page.wait_for_selector("#wrong", state="visible")
    page.evaluate("document.getElementById('photo').decode().then(() => 0)")  # the browser has decoded it by now
    page.wait_for_timeout(300)
    assert page.inner_text("#wrong") == says
    assert page.locator("#work").is_hidden()
    assert page.evaluate("document.body.className") == "empty"
    assert page.inner_text("#said") == ""
    choose(page, drawn)
    assert page.locator("#wrong").is_hidden()
    assert len(page.said) == 1 and "413" in page.said.pop()


def test_without_a_server_no_photo_is_shown_without_a_mask(page, drawn, many_pixels):
    choose(page, drawn)
    page.context.set_offline(True)
    page.set_input_files("#file", many_pixels)
    page.wait_for_selector("#wrong", state="visible")
    page.evaluate("document.getElementById('photo').decode().then(() => 0)")
    page.wait_for_timeout(300)
    assert page.inner_text("#wrong") == "many.jpg: the server does not answer; is it still running?"
    assert page.locator("#work").is_hidden()
    page.context.set_offline(False)
    choose(page, drawn)
    assert page.locator("#wrong").is_hidden()
    assert len(page.said) == 1 and "ERR_INTERNET_DISCONNECTED" in page.said.pop()


def test_the_last_photo_chosen_is_the_one_shown(page, drawn, tmp_path):
    last = tmp_path / "last.png"
    last.write_bytes(photo(80, 40, 2, "PNG"))
    page.set_input_files("#file", drawn)
    choose(page, last)
    page.wait_for_timeout(300)
    assert page.inner_text("#said").startswith("last.png")
    assert page.evaluate("document.getElementById('mask').width") == 80


def test_a_large_photo_is_counted_whole_and_drawn_smaller(page, store, tmp_path):
    large = tmp_path / "large.jpg"
    large.write_bytes(photo(2400, 1801, 3))
    choose(page, large)
    mask, colours = overlaid(mask_png(store.predictor("1"), large.read_bytes()))
    rows = dict(row.split("\t") for row in page.locator("#legend tr").all_inner_texts())
    assert rows["background"] == f"{100 * (mask == 0).mean():.1f} %"
    # no seam between the strips that it is drawn in
    at = (np.arange(1201) + 0.5) * 1801 / 1201, (np.arange(1600) + 0.5) * 2400 / 1600
    nearest = colours[at[0].astype(int)][:, at[1].astype(int)]
    assert (overlay(page) == nearest).all(2).mean() > 0.99


@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, drawn, width, scheme):
    page.set_viewport_size({"width": width, "height": 740})
    page.emulate_media(color_scheme=scheme)
    choose(page, drawn)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for selector in (
        "h1",
        "header p",
        "#hint",
        ".drop b",
        "#said",
        "footer",
        "#legend th",
        "#download",
        "label[for=opacity]",
    ):
        colours = page.evaluate(
            """selector => {
                const box = document.querySelector(selector), grounds = [];
                for (let e = box; e; e = e.parentElement) grounds.push(getComputedStyle(e).backgroundColor);
                return [getComputedStyle(box).color, grounds.find(g => g !== 'rgba(0, 0, 0, 0)')];
            }""",
            selector,
        )
        assert contrast(*colours) >= 4.5, selector


def test_everything_has_a_name(page, drawn):
    choose(page, drawn)
    assert page.get_by_role("slider", name="Opacity").count() == 1
    assert page.get_by_role("checkbox", name="Outlines").count() == 1
    assert page.get_by_role("link", name="Download mask").count() == 1
    assert page.get_by_role("img", name=f"The photo {drawn.name}").count() == 1
    assert page.get_by_role("img", name="Mask over the photo: ").count() == 1
    assert page.get_by_role("table", name="In this photo").count() == 1
    assert page.locator("label.drop").get_by_text("Choose a photo").count() == 1
    assert page.locator("b b").count() == 0  # a file's name is text


def test_a_real_photo(page, store, voc_subset):
    path = sorted((voc_subset / "JPEGImages").iterdir())[0]
    choose(page, path)
    mask, colours = overlaid(mask_png(store.predictor("1"), path.read_bytes()))
    assert np.array_equal(overlay(page), colours)
    assert page.locator("#legend tr").count() == len(np.unique(mask))
