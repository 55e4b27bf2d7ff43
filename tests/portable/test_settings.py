import pytest

from segmentation.errors import PipelineError
from segmentation.settings import load_settings


@pytest.fixture
def params(root):
    return root / "params.yaml"


def test_the_defaults_are_the_report(params):
    settings = load_settings(params)
    assert settings.preprocess.image_size == 518
    assert settings.encoder.name == "vit_base_patch14_dinov2"
    assert settings.encoder.pretrained
    assert settings.encoder.trainable_blocks == 1
    assert settings.decoder.channels == [512, 256, 128, 64]
    assert (settings.train.epochs, settings.train.batch_size, settings.train.lr) == (8, 2, 1e-4)


def test_every_key_has_a_comment(params):
    lines = [line for line in params.read_text().splitlines() if line.startswith("  ")]
    assert lines
    assert [line for line in lines if "# " not in line] == []


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ({"train.epoch": 3}, ["train.epoch: unknown key", "3", "train.epochs"]),
        ({"trian.epochs": 3}, ["trian: unknown key", "did you mean train"]),
        ({"train.epochs": "eight"}, ["train.epochs", "'eight'", "integer"]),
        ({"train.epochs": 2.4}, ["train.epochs", "2.4", "nearest valid value is 2"]),
        ({"train.epochs": 0}, ["train.epochs", "0", "at least 1"]),
        ({"train.lr": "1e-4"}, ["train.lr", "'1e-4'", "nearest valid value is 0.0001"]),
        ({"decoder.channels": [0, 1, 2, 3]}, ["decoder.channels.0: 0", "at least 1"]),
        ({"encoder.trainable_blocks": -1}, ["encoder.trainable_blocks: -1", "at least 0; or: -1 is not one of all"]),
        ({"train.scale": [0.001, 2.0]}, ["train.scale.0: 0.001", "at least 0.1"]),
        ({"train.lr": float("inf")}, ["train.lr", "inf", "finite"]),
        ({"evaluate.scales": [1.0, 1.0]}, ["evaluate", "names one twice"]),
        ({"train.keep": "bst"}, ["train.keep", "'bst'", "nearest is best"]),
        ({"fetch.source": "voc"}, ["fetch.source", "'voc'", "nearest is voc2012"]),
        ({"fetch.source": "directory", "fetch.directory": None}, ["fetch: directory: is not set", "docs/own-data.md"]),
        ({"fetch.source": "directory", "fetch.directory": " "}, ["fetch: directory: ' ' is no path"]),
        ({"fetch.source": "directory", "fetch.directory": 5}, ["fetch: directory: 5 is no path", "quotes: '5'"]),
        ({"fetch.source": "directory", "fetch.directory": ["a"]}, ["fetch: directory: ['a'] is no path"]),
        ({"fetch.source": "directory", "fetch.directory": "~/x"}, []),
        *(({"fetch.source": "sample", "fetch.directory": unused}, []) for unused in (None, "", 5, "/nowhere", ["a"])),
        ({"fetch.md5": 12345678901234567890123456789012}, ["fetch.md5", "quotes: '12345678901234567890123456789012'"]),
        ({"encoder.pretrained": "yes"}, ["encoder.pretrained", "'yes'", "boolean"]),
        ({"preprocess.image_size": 500}, ["preprocess.image_size", "500", "14", "nearest valid size is 504"]),
        ({"preprocess.image_size": 224, "encoder.name": "vit_base_patch32_224"}, []),
        ({"epochs": 3}, ["'epochs'", "section.key"]),
    ],
)
def test_a_refusal_names_key_value_and_nearest_valid_one(params, override, says):
    if not says:
        assert load_settings(params, override)
        return
    with pytest.raises(PipelineError) as refusal:
        load_settings(params, override)
    for words in says:
        assert words in str(refusal.value)


def test_all_refusals_are_listed_together(params):
    with pytest.raises(PipelineError) as refusal:
        load_settings(params, {"train.epochs": 0, "train.keep": "x", "validate.foo": 1})
    for key in ("train.epochs", "train.keep", "validate.foo"):
        assert key in str(refusal.value)


def test_a_number_as_dvc_writes_it_is_a_number(tmp_path, params):
    edited = tmp_path / "params.yaml"
    edited.write_text(params.read_text().replace("lr: 1.0e-4", "lr: 1e-3"))
    assert load_settings(edited).train.lr == 1e-3


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"params\.yaml: not found"):
        load_settings(tmp_path / "params.yaml")
    broken = tmp_path / "params.yaml"
    broken.write_text("train: [")
    with pytest.raises(PipelineError, match="not valid YAML"):
        load_settings(broken)


def test_settings_are_frozen(params):
    settings = load_settings(params)
    with pytest.raises(ValueError, match="frozen"):
        settings.train.epochs = 3


def test_what_is_set_without_effect_is_said(params):
    cases = {
        "train.encoder_lr_scale": {"train.encoder_lr_scale": 0.1, "encoder.trainable_blocks": 0},
        "train.layer_decay": {"train.layer_decay": 0.9},
        "decoder.norm": {"decoder.type": "linear", "decoder.norm": "group"},
        "train.class_weights": {"train.class_weights": "median_frequency"},
        "train.warmup_epochs": {"train.warmup_epochs": 1, "train.schedule": "onecycle"},
    }
    assert load_settings(params).without_effect() == []
    for key, override in cases.items():
        (said,) = load_settings(params, override).without_effect()
        assert said.startswith(key)
        assert said.endswith("it has no effect")
