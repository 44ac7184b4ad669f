"""What `__post_init__` of the configurations asks for: each refuses with a `ValueError`."""

from typing import Any


def require(holds: bool, message: str) -> None:
    """Refuse with `message` what does not hold."""
    if not holds:
        raise ValueError(message)


def require_at_least(bound: float, group: str, config: object, *keys: str) -> None:
    """Refuse a value of `keys` below `bound`."""
    for key in keys:
        value = getattr(config, key)
        require(value >= bound, f"{group}.{key}={value}: use {bound} or more")


def listed(value: Any, kind: type | tuple[type, ...], key: str, wanted: str) -> list:
    """A list of `kind` from null, one value or a list: what a person types for one thing or for many."""
    items = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    right = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
    require(right, f"{key}={value}: use {wanted}")
    return items
