import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from segmentation.data.voc import CLASSES
from segmentation.registry.client import MODEL_NAME
from serving.http import preferred
from tests.serving.conftest import mask_png, photo

ANSWERS = ("image/png", "application/json")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    "sent",
    [
        "application/octet-stream",
        "image/png",
        "image/jpeg; q=1",
        "image/jpg",
        "image/pjpeg",
        "image/x-png",
        "IMAGE/JPG",
        "image/webp",
        "binary/octet-stream",
        "",
    ],
)
def test_a_mask_is_the_bytes_that_the_predictor_gives(store, server, kind, sent):
    body = photo(91, 64, 1, kind)
    answer = server.segment(body, **{"Content-Type": sent})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Model-Version"] == "1"
    assert answer.content == mask_png(store.predictor("1"), body)


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ("text/plain; charset=utf-8", "'text/plain'"),
        ("multipart/form-data; boundary=x", "'multipart/form-data'"),
        ("application/x-www-form-urlencoded", "'application/x-www-form-urlencoded'"),  # curl's, where none is given
        ("application/json", "'application/json'"),
        ("imagejpeg", "'imagejpeg'"),
        ("text/\x85plain".encode("latin-1"), "'text/\\x85plain'"),
    ],
)
def test_a_type_that_no_photo_has_is_refused_by_its_name(server, sent, named):
    answer = server.segment(photo(91, 64, 1), **{"Content-Type": sent})
    assert answer.status_code == 415
    assert answer.json()["detail"] == (
        f"Content-Type: {named} was sent; send the photo alone, as image/jpeg, image/png or application/octet-stream"
    )


def test_a_mask_is_upright(store, server):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    body = photo(91, 64, 1, exif=exif)
    answer = server.segment(body)
    assert Image.open(io.BytesIO(answer.content)).size == (64, 91)
    assert answer.content == mask_png(store.predictor("1"), body)


def test_a_photo_in_16_bit_grey_has_the_mask_of_its_8_bits_served_and_loaded(store, server):
    grey = Image.open(io.BytesIO(photo(91, 64, 1, "PNG"))).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    bodies = [io.BytesIO(), io.BytesIO()]
    for image, body in zip((grey, deep), bodies, strict=True):
        image.save(body, "PNG")
    wanted = mask_png(store.predictor("1"), bodies[0].getvalue())
    assert len(np.unique(np.asarray(Image.open(io.BytesIO(wanted))))) > 3
    assert server.segment(bodies[1].getvalue()).content == wanted
    with store.here():
        model = mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}/1")
    assert model.predict(pd.DataFrame({"image": [bodies[1].getvalue()]}))["mask"][0] == wanted


def test_a_real_photo_has_the_mask_of_the_predictor(store, server, voc_subset):
    body = next(iter(sorted((voc_subset / "JPEGImages").iterdir()))).read_bytes()
    assert server.segment(body).content == mask_png(store.predictor("1"), body)


def test_as_json_the_shares_are_those_of_the_mask(server):
    body = photo(91, 64, 1)
    answer = server.segment(body, Accept="application/json")
    said = answer.json()
    mask = np.asarray(Image.open(io.BytesIO(server.segment(body).content)))
    assert answer.headers["Model-Version"] == said["model_version"] == "1"
    assert (said["width"], said["height"]) == (91, 64)
    assert {found["id"]: found["share"] for found in said["classes"]} == {
        int(label): (mask == label).mean() for label in np.unique(mask)
    }
    shares = [found["share"] for found in said["classes"]]
    assert shares == sorted(shares, reverse=True)
    assert len(shares) > 3
    assert all(found["name"] == CLASSES[found["id"]] for found in said["classes"])


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("application/json", "application/json"),
        ("text/html, application/json;q=0.9, */*;q=0.1", "application/json"),
        ("image/png;q=0.5, application/*", "application/json"),
        ("APPLICATION/JSON ; charset=utf-8 ; q=1", "application/json"),
        ("image/png;q=0, */*", "application/json"),
        ("*/*;q=1, application/json;q=0.2", "image/png"),
        ("text/html", None),
        ("image/png;q=0", None),
        ("image/png;q=no", None),
        ("", None),
        (";;,,q=", None),
    ],
)
def test_the_answer_is_what_accept_likes_best(accept, answer):
    assert preferred(accept, ANSWERS) == answer


def test_the_model_says_where_it_comes_from(server):
    said = requests.get(f"{server.url}/model", timeout=5).json()
    assert said["version"] == "1"
    assert said["aliases"] == ["champion"]
    assert said["tags"] == {"experiment": "seed-1", "dvc_lock_sha256": f"{1:064x}"}
    assert said["metrics"] == {"miou": 0.25, "photos": 4}
    assert (said["encoder"], said["image_size"]) == ("vit_small_patch14_dinov2", 56)
    assert said["classes"][:2] == [
        {"id": 0, "name": "background", "colour": "#000000"},
        {"id": 1, "name": "aeroplane", "colour": "#800000"},
    ]
    assert [found["name"] for found in said["classes"]] == list(CLASSES)
    health = requests.get(f"{server.url}/healthz", timeout=5)
    assert health.json() == {"status": "ok", "model_version": "1", "waiting": 0, "detail": None}


def test_requests_at_once_each_get_their_own_mask(store, server):
    bodies = [photo(40 + 3 * seed, 64, seed) for seed in range(12)]
    expected = [mask_png(store.predictor("1"), body) for body in bodies]
    assert len(set(expected)) == 12
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda at: server.segment(bodies[at % 12]).content, range(24)))
    assert answers == [expected[at % 12] for at in range(24)]


def test_schemathesis_finds_nothing(server, tmp_path):
    report = tmp_path / "report.json"
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "--checks", "all",
        "--max-examples", "25", "--seed", "1", "--generation-database", "none", "--no-color",
        "--report-json-path", str(report),
    ]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout
    assert "4 selected / 4 total" in run.stdout
    assert report.exists()


def test_openapi_names_every_status_with_a_schema(server):
    schema = requests.get(f"{server.url}/openapi.json", timeout=5).json()
    assert set(schema["paths"]) == {"/", "/segment", "/model", "/healthz"}
    (post,) = schema["paths"]["/segment"].values()
    assert set(post["responses"]) == {"200", "406", "408", "413", "415", "422", "431", "500", "503", "504"}
    for path in schema["paths"].values():
        for operation in path.values():
            assert operation["description"]
            for status, answer in operation["responses"].items():
                assert all(content["schema"] for content in answer["content"].values())
                assert status == "200" or list(answer["content"]) == ["application/json"]
    assert set(post["responses"]["200"]["content"]) == set(ANSWERS)
    assert "traceback" not in json.dumps(schema).lower()
