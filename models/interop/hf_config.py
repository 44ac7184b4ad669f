"""Reading a config.json of which no key may go unnoticed."""

from typing import Any


class InteropError(ValueError):
    """A model or a file that cannot be carried over. Names key or tensor, value and cure."""


class HFConfig:
    """A config.json of which every key is asked for: one that nobody knows may change what the model computes."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._asked: set[str] = set()

    def take(self, key: str, *default: Any) -> Any:
        """The value of `key`, or the default if the file leaves it out; without a default it must be there."""
        self._asked.add(key)
        if key not in self.values and not default:
            raise InteropError(f"{self.where} has no key {key!r}: complete it")
        return self.values.get(key, *default)

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value that our models do not have; the first of `allowed` is what a missing key means."""
        if (value := self.take(key, allowed[0])) not in allowed:
            raise InteropError(f"{self.where}: {key}={value} is not supported, only {' or '.join(map(str, allowed))}")

    def finish(self, inert: frozenset[str]) -> None:
        """Refuse keys that nobody has asked for."""
        for key in sorted(set(self.values) - self._asked - inert):
            raise InteropError(
                f"{self.where}: {key}={self.values[key]} is unknown here and may change what the model computes: "
                "take the key out of the file if it does not"
            )
