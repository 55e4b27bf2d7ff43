import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prefect.client.orchestration import get_client
from prefect.utilities.callables import parameter_schema
from ruamel.yaml import YAML

from flows.predict import predict
from segmentation.data.images import read_mask, read_photo
from segmentation.data.sample import draw_sample
from segmentation.errors import PipelineError
from segmentation.registry.client import connect
from segmentation.registry.versions import find_version, load_predictor
from tests.conftest import environment


@pytest.fixture
def photos(tmp_path) -> Path:
    draw_sample(tmp_path / "raw", 1)
    folder = tmp_path / "raw/JPEGImages"
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def test_the_champion_predicts_what_it_predicts_anywhere(checkout, photos):
    result = predict(str(photos))
    count = len(list(photos.iterdir()))
    assert result | {"table": ""} == {
        "version": "1", "photos": count, "failed": 1, "done_before": 0, "left_out": 0, "table": "",
    }  # fmt: skip
    out = checkout / "runs/predictions/JPEGImages"
    assert Path(result["table"]) == out / "predictions.parquet"
    rows = pd.read_parquet(result["table"]).set_index("path")
    predictor = load_predictor(find_version(connect(), "champion"))
    assert predictor.augmentation.flip  # as it was evaluated, not the default
    name = str(photos / "val_001.jpg")
    assert np.array_equal(read_mask(out / rows["mask"][name]), predictor.mask(read_photo(Path(name))[0]))
    with get_client(sync_client=True) as client:
        artifacts = client.request(
            "POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": ["predict-progress"]}}}
        ).json()
    assert (100, f"{count} of {count} photos of {photos}") in [
        (each["data"], each["description"]) for each in artifacts
    ]


@pytest.mark.slow
def test_by_hand_it_goes_on_without_a_server(checkout, photos, root):
    predict(str(photos), "masks")
    # as a user has it who copied it and filled nothing in: a temporary server has a password of its own
    (checkout / ".env").write_bytes((root / ".env.example").read_bytes())
    count = len(list(photos.iterdir()))
    (photos / "a.webp").write_bytes(b"RIFF")
    command = [sys.executable, "-m", "flows.predict", str(photos), "--out", "masks", "--version", "1"]
    done = subprocess.run(command, cwd=checkout, env=environment(), text=True, capture_output=True, check=True)
    assert f"photos   {count}: 1 failed, {count - 1} were done before\n  left out 1 other files\n" in done.stdout
    assert "1 left out, not named as JPEG or PNG: 1 .webp (a.webp); all names: " in done.stderr


def test_another_folder_of_the_same_name_is_refused_and_the_first_table_stays(checkout, photos, tmp_path):
    for name in ("a/photos/one.jpg", "b/photos/two.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes((photos / "val_001.jpg").read_bytes())
    first, other = tmp_path / "a/photos", tmp_path / "b/photos"
    table = Path(predict(str(first))["table"])
    assert table.parent == checkout / "runs/predictions/photos"
    before = table.read_bytes()
    with pytest.raises(PipelineError, match=rf"has the masks of {first}; choose .* of {other} \(--out\)"):
        predict(str(other))
    assert table.read_bytes() == before
    assert [path.name for path in (table.parent / "masks").iterdir()] == ["one.jpg.png"]
    assert predict(str(other), "elsewhere")["photos"] == 1


def test_what_is_not_there_is_refused(checkout, photos):
    with pytest.raises(PipelineError, match="nothing: no folder and no list of photos"):
        predict("nothing")
    with pytest.raises(PipelineError, match="source: is empty"):
        predict(" ")
    with pytest.raises(PipelineError, match="has no version or alias '99'"):
        predict(str(photos), version="99")


def test_the_form_of_the_deployment_explains_itself(root):
    deployments = YAML(typ="safe").load((root / "prefect.yaml").read_text())["deployments"]
    folder = next(entry for entry in deployments if entry["entrypoint"] == "flows/predict.py:predict")
    assert folder["name"] == "folder"
    fields = parameter_schema(predict.fn).properties
    assert all(field.get("description") for field in fields.values())
