"""What checks of the configuration share."""

from collections.abc import Iterable

from twohop.trainer.cli import suggest
from twohop.trainer.errors import ConfigError


def check_name(key: str, name: str, known: Iterable[str]) -> None:
    """Raise a ConfigError unless `name`, the value of `key`, is known."""
    names = list(known)
    if name not in names:
        raise ConfigError(f"{key}={name}: unknown{suggest(name, names)}; use one of {', '.join(names)}")


def divisors(number: int) -> list[int]:
    """All divisors of a number, the smallest first."""
    return [d for d in range(1, number + 1) if number % d == 0]
