"""Let Great Expectations judge every mask of data/processed; a broken critical rule fails the stage."""

from segmentation.data.voc import VocFolder
from segmentation.paths import DATA_CHECKS, MANIFEST, PROCESSED, RAW, scratch
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.checks.checks import check_masks
    from segmentation.data.palettes import find_reference
    from segmentation.files import sha256_file, write_json

    folder = VocFolder(RAW)
    classes = folder.classes()
    docs = scratch() / "data_docs" / sha256_file(MANIFEST)[:12]
    size, most = settings.preprocess.image_size, settings.validate_.max_void_share
    checks = check_masks(PROCESSED, classes, size, most, docs, find_reference(folder, classes))
    print(f"validate: Data Docs in {checks.docs_index}", flush=True)
    checks.raise_if_critical()
    write_json(DATA_CHECKS, checks.to_json())


if __name__ == "__main__":
    run_stage(main, __doc__)
