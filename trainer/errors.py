"""Errors that are the user's to cure: shown as one line, without a traceback, with exit code 2."""


class UserError(Exception):
    """Bad input. The message names the key or file, its value and the cure."""


class ConfigError(UserError):
    """A configuration that cannot run."""


class DataError(UserError):
    """Text or token files that are missing, empty, unreadable or too short."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model."""
