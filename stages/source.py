"""Look whether what fetch would read has changed, and refuse settings that are wrong."""

from segmentation.paths import SOURCE
from segmentation.settings import Settings
from stages._stage import run_stage


def main(settings: Settings) -> None:
    from segmentation.data.fetch import fingerprint
    from segmentation.files import write_json

    write_json(SOURCE, {"source": settings.fetch.source, "fingerprint": fingerprint(settings.fetch)})


if __name__ == "__main__":
    run_stage(main, __doc__)
