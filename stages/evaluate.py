"""Score the trained model on the val split and draw its first predictions."""

from segmentation.paths import EVALUATION, MANIFEST, MODEL, RAW
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.evaluation import evaluate

    evaluate(MODEL, RAW, MANIFEST, EVALUATION, settings.evaluate.panels)


if __name__ == "__main__":
    run_stage(main, __doc__)
