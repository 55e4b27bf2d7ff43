"""Train the model on data/processed; go on from the last finished epoch after a kill."""

from segmentation.paths import MODEL, PROCESSED, RAW, TRAINING, scratch
from segmentation.settings import Settings
from segmentation.voc import VocFolder
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.training import train

    train(settings, PROCESSED, VocFolder(RAW).classes(), MODEL, TRAINING, scratch())


if __name__ == "__main__":
    run_stage(main, __doc__)
