"""Exit codes, and the errors that a person should read as one line instead of a traceback."""

OK, ERROR, USAGE, VERDICT, PARTIAL, INTERRUPTED = 0, 1, 2, 3, 4, 130


class UsageError(ValueError):
    """The command asks for something that cannot be: an unknown name, a missing file, options that contradict."""


class ControlError(RuntimeError):
    """A control of the audit failed: its verdicts cannot be trusted."""
