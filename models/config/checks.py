"""What every `__post_init__` asks for."""


def require(holds: bool, message: str) -> None:
    """Refuse with `message` what does not hold."""
    if not holds:
        raise ValueError(message)
