"""Resize photos and masks of data/raw into data/processed and describe them in its manifest.parquet."""

from segmentation.paths import PROCESSED, RAW
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.data.preprocess import preprocess

    preprocess(RAW, PROCESSED, settings.preprocess.image_size)


if __name__ == "__main__":
    run_stage(main, __doc__)
