"""Packages whose names are imported on first use, so that reading a configuration or `--help` needs no torch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazily(package: str, home: dict[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds each name in its home, a module of the package: {name: module}."""

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return get
