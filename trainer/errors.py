"""What can go wrong, by who can cure it."""


class UserError(Exception):
    """Bad input, shown as one line without a traceback, exit code 2. Names the key or file, its value and the cure."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """Text or token files that are missing, empty, unreadable or too short."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model."""


class Interrupted(Exception):  # noqa: N818 (no error)
    """A signal ended training after a checkpoint, in order: exit code 75, EX_TEMPFAIL of sysexits.h, "try again"."""


class WorkerError(Exception):
    """A worker process failed in a way that nobody foresaw: its rank, and its traceback if it left one."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback
