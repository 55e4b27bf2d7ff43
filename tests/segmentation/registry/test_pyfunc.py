"""The registered model as MLflow loads and serves it, from a real store."""

import base64
import io
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc import PyFuncModel, scoring_server
from PIL import Image
from starlette.testclient import TestClient

from benchmarks.serving import register_random
from segmentation.data.voc import CLASSES
from segmentation.errors import PipelineError
from segmentation.model.segmenter import ModelCard
from segmentation.prediction.predictor import Augmentation, Predictor, mask_png
from segmentation.registry.client import MODEL_NAME

CARD = ModelCard(
    encoder="vit_small_patch14_dinov2", trainable_blocks=1, decoder="linear", decoder_channels=[], decoder_norm="batch",
    skip_connections=[], image_size=28, classes=list(CLASSES), encoder_weights="random", epoch=1,
)  # fmt: skip
SIZES = {"a": (40, 30), "b": (30, 40), "c": (50, 20)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        register_random(folder / "run", CARD, 1)
        yield folder


@pytest.fixture(scope="module")
def model(store: Path) -> PyFuncModel:
    return mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}/1")


@pytest.fixture(scope="module")
def photos() -> dict[str, bytes]:
    """Three photos, of three sizes."""
    found = {}
    for seed, (name, size) in enumerate(SIZES.items()):
        stream = io.BytesIO()
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size).save(stream, "PNG" if name == "b" else "JPEG")
        found[name] = stream.getvalue()
    return found


@pytest.fixture(scope="module")
def masks(store: Path, photos: dict[str, bytes]) -> dict[str, bytes]:
    """What a bare predictor makes of them; no two are the same."""
    predictor = Predictor.load(store / "run/models", Augmentation())
    found = {
        name: mask_png(predictor.mask(Image.open(io.BytesIO(photo)).convert("RGB"))) for name, photo in photos.items()
    }
    assert len(set(found.values())) == 3
    return found


def text(photo: bytes) -> str:
    return base64.b64encode(photo).decode()


@pytest.mark.parametrize(
    "rows",
    [
        lambda frame: frame[frame["order"] < 3],  # a filter
        lambda frame: frame.sort_values("order"),
        lambda frame: pd.concat([frame, frame.iloc[:1]]),  # one label twice
        lambda frame: frame.set_index(pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["set", "at"])),
        lambda frame: frame.set_index("order"),
        lambda frame: frame.iloc[:0],
        lambda frame: frame["image"].iloc[::-1],  # a series
    ],
)
def test_a_mask_stays_with_its_row(model, photos, masks, rows):
    frame = pd.DataFrame({"name": list("abc"), "order": [3, 1, 2], "image": photos}, index=list("abc"))
    asked = rows(frame)
    predicted = model.predict(asked)
    assert list(predicted.columns) == ["mask"]
    assert predicted.index.equals(asked.index)
    assert predicted.index.names == asked.index.names
    names = {photo: name for name, photo in photos.items()}
    images = asked if isinstance(asked, pd.Series) else asked["image"]
    assert list(predicted["mask"]) == [masks[names[image]] for image in images]
    assert predicted["mask"].dtype == object


@pytest.mark.parametrize(
    "given",
    [
        bytes,
        bytearray,
        memoryview,
        np.bytes_,
        text,
        lambda photo: text(photo).encode(),
        lambda photo: base64.encodebytes(photo).decode(),  # in lines
    ],
)
def test_a_photo_is_bytes_or_base64_text(model, photos, masks, given):
    frame = pd.DataFrame({"image": pd.Series([given(photos["b"]), given(photos["a"])], dtype=object)})
    assert list(model.predict(frame)["mask"]) == [masks["b"], masks["a"]]


@pytest.mark.parametrize(
    "ask",
    [
        lambda a, b: {"image": [a, b]},
        lambda a, b: [{"image": a}, {"image": b}],
        lambda a, b: pd.DataFrame({"image": np.array([a, b])}),  # numpy's own bytes
        lambda a, b: pd.DataFrame({"image": [text(a), text(b)]}),  # pandas' own text
    ],
)
def test_other_shapes_that_mlflow_takes(model, photos, masks, ask):
    assert list(model.predict(ask(photos["a"], photos["b"]))["mask"]) == [masks["a"], masks["b"]]


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        (None, "NoneType is no photo"),
        (np.nan, "float is no photo"),
        (Path("photos/a.jpg"), "PosixPath is no photo"),
        (["/9j/4AAQ"], "list is no photo"),
        ("photos/a.jpg", "'photos/a.jpg' is no base64 text; if it is a path, read the file"),
        ("fotos/schön.jpg", "'fotos/schön.jpg' is no base64 text; if it is a path, read the file"),
        ("/data/photo1", "no readable JPEG or PNG"),  # letters that base64 has, too
        (b"", "no readable JPEG or PNG"),
        (b"\xff\xd8\xff\xe0", "no readable JPEG or PNG"),
    ],
)
def test_a_row_without_a_photo_is_named(model, photos, cell, says):
    frame = pd.DataFrame({"image": pd.Series([photos["a"], cell], index=["x", "y"], dtype=object)})
    with pytest.raises(PipelineError) as error:
        model.predict(frame)
    assert str(error.value).startswith("column image, row 2 of 2 (index 'y'): ")
    assert says in str(error.value)
    assert str(error.value).endswith("; give the bytes of a JPEG or PNG file, or their base64 text")


def test_a_photo_cut_short_is_named_by_its_place_and_its_label(model, photos):
    frame = pd.DataFrame({"image": [photos["a"], photos["c"][:-20]]}, index=[7, 7])
    with pytest.raises(PipelineError, match=r"row 2 of 2 \(index 7\): photo: no readable JPEG or PNG: image file"):
        model.predict(frame)


@pytest.fixture(scope="module")
def server(model):
    """The application that `mlflow models serve` runs."""
    with TestClient(scoring_server.init(model)) as client:
        yield client


@pytest.mark.parametrize(
    "body",
    [
        lambda a, b: {"dataframe_records": [{"image": a}, {"image": b}]},
        lambda a, b: {"dataframe_split": {"columns": ["image"], "index": [9, 3], "data": [[a], [b]]}},
        lambda a, b: {"dataframe_split": {"columns": ["id", "image"], "data": [[1, a], [2, b]]}},
        lambda a, b: {"inputs": {"image": [a, b]}},
        lambda a, b: {"inputs": [{"image": a}, {"image": b}]},
        lambda a, b: {"instances": [{"image": a}, {"image": b}]},
    ],
)
def test_mlflows_own_server_takes_photos_as_base64(server, photos, masks, body):
    answer = server.post("/invocations", json=body(text(photos["b"]), text(photos["a"])))
    assert answer.status_code == 200, answer.text
    assert [base64.b64decode(row["mask"]) for row in answer.json()["predictions"]] == [masks["b"], masks["a"]]


def test_mlflows_own_server_names_the_row_of_a_bad_photo(server, photos):
    records = [{"image": text(photos["a"])}, {"image": text(photos["b"][:-30])}]
    answer = server.post("/invocations", json={"dataframe_records": records})
    assert answer.status_code == 400
    assert "PipelineError: column image, row 2 of 2 (index 1): photo: no readable JPEG or PNG" in answer.text
