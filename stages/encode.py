"""Compute what the frozen part of the encoder makes of every photo, once; go on with what a killed run finished."""

from segmentation.paths import FEATURES, PROCESSED, scratch
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.model.features import encode

    encode(settings, PROCESSED, FEATURES, scratch())


if __name__ == "__main__":
    run_stage(main, __doc__)
