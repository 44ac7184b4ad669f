"""The one error of the communication layer."""


class CommError(RuntimeError):
    """Communication failed or would have failed; the message names rank, layer and phase, and the cure if known."""
