"""Train the model on data/features and the masks of data/processed; go on from the last finished epoch after a kill."""

from segmentation.data.voc import VocFolder
from segmentation.paths import FEATURES, MODEL, PROCESSED, RAW, TRAINING, scratch
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.training.loop import train

    train(settings, PROCESSED, FEATURES, VocFolder(RAW).classes(), MODEL, TRAINING, scratch())


def summary(settings: Settings) -> None:
    """print the layers of the model that params.yaml describes, their sizes and parameters, and train nothing"""
    from segmentation.model.summary import summarise
    from segmentation.training.loop import model_card

    print(summarise(model_card(settings, VocFolder(RAW).classes())))


if __name__ == "__main__":
    run_stage(main, __doc__, summary)
