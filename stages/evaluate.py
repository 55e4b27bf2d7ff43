"""Score the trained model on the val split, draw its predictions and write the report page."""

from segmentation.paths import DATA_CHECKS, EVALUATION, FEATURES, MANIFEST, MODEL, RAW, REPORT, TRAINING
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.evaluation.evaluate import evaluate
    from segmentation.reporting.report import write_report

    evaluate(MODEL, RAW, FEATURES, MANIFEST, EVALUATION, settings.evaluate)
    write_report(REPORT, TRAINING, EVALUATION, DATA_CHECKS, MODEL, RAW, settings)


if __name__ == "__main__":
    run_stage(main, __doc__)
