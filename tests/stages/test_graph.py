"""dvc.yaml against the code: a stage names all code that decides its output, and nothing else."""

import grimp
import pytest
from ruamel.yaml import YAML

from segmentation.settings import Settings
from segmentation.training.loop import CODE

ENTRY = {
    "fetch": ["data.fetch"],
    "preprocess": ["data.preprocess"],
    "validate": ["checks.checks"],
    "encode": ["model.features"],
    "train": ["training.loop"],
    "evaluate": ["evaluation.evaluate", "reporting.report"],
}
# They carry values, names, messages and checkpoints: what they say is in params.yaml or in the outputs' own paths.
NOT_DECIDING = {
    "data/file_kinds", "errors", "files", "model/encoder_names", "model/hub", "names", "paths", "progress",
    "scratch_folders", "settings", "training/checkpoints", "training/live_curves",
}  # fmt: skip


@pytest.fixture(scope="module")
def stages(root):
    return YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"]


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("segmentation", cache_dir=None)


@pytest.mark.parametrize("stage", ENTRY)
def test_a_stage_depends_on_the_code_that_decides_its_output(stages, graph, stage):
    entries = [f"segmentation.{name}" for name in ENTRY[stage]]
    modules = {name for entry in entries for name in (entry, *graph.find_upstream_modules(entry))}
    wanted = {name.partition(".")[2].replace(".", "/") for name in modules} - NOT_DECIDING
    named = {
        dep.removeprefix("segmentation/").removesuffix(".py") for dep in stages[stage]["deps"] if dep.endswith(".py")
    }
    assert named == wanted


def test_checkpoints_are_keyed_by_the_same_code_as_train(stages):
    assert {dep for dep in stages["train"]["deps"] if "segm" in dep} == {f"segmentation/{name}.py" for name in CODE}


def test_no_parameter_has_a_name_that_dvcs_run_cache_overlooks(root):
    """`dvc.stage.cache` hashes a stage without the keys `size` and `nfiles`, parameters included."""

    def names(values):
        for key, value in values.items():
            yield key
            if isinstance(value, dict):
                yield from names(value)

    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    assert not {"size", "nfiles"} & set(names(params))


def test_stage_module_and_section_share_one_name(stages, root):
    sections = {field.alias or name for name, field in Settings.model_fields.items()}
    for stage, entry in stages.items():
        assert entry["cmd"] == f"python3 -m stages.{stage}"
        assert (root / "stages" / f"{stage}.py").exists()
        # `source` runs in every run, for fetch
        assert stage in sections or (stage == "source" and entry["always_changed"])
        assert {key.split(".")[0] for key in entry.get("params", [])} <= sections
