"""What a key of the configuration is where nothing sets it."""

from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_args, get_type_hints

from twohop.trainer.config.commands import Config


def default_of(key: str) -> Any:
    """The default of a key such as "model.moe.every", an enum as its name; None if there is no such key.

    Of a group that may be null: what its key is once the group is set.
    """
    group: Any = Config
    value = None
    for name in key.split("."):
        hints = get_type_hints(group) if is_dataclass(group) else {}
        if name not in hints:
            return None
        value = getattr(group(), name)
        group = next((kind for kind in (hints[name], *get_args(hints[name])) if is_dataclass(kind)), type(None))
    return value.name if isinstance(value, Enum) else value
