"""The one exception that means "the user can mend this": its text names the file or key and the remedy."""


class PipelineError(Exception):
    """Shown without a traceback; the process exits with status 1."""
