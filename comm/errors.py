"""The errors of the communication layer."""


class CommError(RuntimeError):
    """Communication failed or would have failed; the message names rank, layer and phase, and the cure if known."""


class NotFiniteError(CommError):
    """A rank was given rows with NaN or infinities; found before they spread, and raised on every rank."""
