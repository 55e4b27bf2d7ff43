"""The one exception that means "the user can mend this": its text names the file or key and the remedy."""


class PipelineError(Exception):
    """Shown without a traceback; the process exits with status 1."""


def error_text(error: Exception) -> str:
    """What a person reads of an error: a `PipelineError` says what to do, any other needs its kind in front."""
    return str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
