from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """Real VOC pairs in VOC layout, kept beside the repository and never in it."""
    folder = ROOT.parent / "shared" / "voc2012-subset" / "VOCdevkit" / "VOC2012"
    if not folder.is_dir():
        pytest.skip("real VOC pairs are not here: ../shared/voc2012-subset is missing")
    return folder
