"""Train the model on data/features and the masks of data/processed; go on from the last finished epoch after a kill."""

from segmentation.paths import FEATURES, MODEL, PROCESSED, RAW, TRAINING, scratch
from segmentation.settings import Settings
from segmentation.voc import VocFolder
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.training import train

    train(settings, PROCESSED, FEATURES, VocFolder(RAW).classes(), MODEL, TRAINING, scratch())


def summary(settings: Settings) -> None:
    """print the layers of the model that params.yaml describes, their sizes and parameters, and train nothing"""
    from segmentation.summary import summarise
    from segmentation.training import model_card

    print(summarise(model_card(settings, VocFolder(RAW).classes())))


if __name__ == "__main__":
    run_stage(main, __doc__, summary)
