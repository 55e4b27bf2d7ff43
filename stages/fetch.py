"""Bring photos and masks into data/raw, in VOC layout."""

from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.data.fetch import fetch

    if settings.fetch.source != "sample":  # what is wrong with it shows before a long download
        from segmentation.model.encoder import check_encoder

        check_encoder(settings.encoder, settings.preprocess.image_size, settings.decoder.skip_connections)
    fetch(settings.fetch)


if __name__ == "__main__":
    run_stage(main, __doc__)
