"""What an attention layer keeps of the positions that it has seen.

Shapes: B sequences, T new positions, S kept positions, G key/value heads, A head width.
"""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """The memory of one attention layer."""

    @property
    def length(self) -> int:
        """Positions seen."""
        ...


class KVCache:
    """Keys and values of `max_len` positions; with `keep`, of the last `keep` positions before the new ones."""

    def __init__(self, max_len: int, keep: int | None = None) -> None:
        self.length = 0
        self.max_len, self.keep = max_len, keep
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BGTA: Tensor, v_BGTA: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T positions and returns those that are kept, new ones last: [B, G, S, A] twice."""
        start, self.length = self.length, self.length + k_BGTA.shape[2]
        if self.keep is not None:
            self._keys, self._values = self._shift(self._keys, k_BGTA), self._shift(self._values, v_BGTA)
            return self._keys, self._values
        if self._keys is None or self._values is None:
            # Allocated here, where batch size, device and dtype (autocast's, perhaps) are known.
            batch, heads = k_BGTA.shape[:2]
            self._keys = k_BGTA.new_empty(batch, heads, self.max_len, k_BGTA.shape[-1])
            self._values = v_BGTA.new_empty(batch, heads, self.max_len, v_BGTA.shape[-1])
        self._keys[:, :, start : self.length] = k_BGTA
        self._values[:, :, start : self.length] = v_BGTA
        return self.kept()

    def kept(self) -> tuple[Tensor, Tensor]:
        """All keys and values that are kept: [B, G, S, A] twice. There must be some."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def _shift(self, old_BGSA: Tensor | None, new_BGTA: Tensor) -> Tensor:
        """Kept positions and new ones, one behind the other."""
        assert self.keep is not None
        if old_BGSA is None:
            return new_BGTA
        dropped = max(0, old_BGSA.shape[2] - self.keep)
        return torch.cat([old_BGSA[:, :, dropped:], new_BGTA], 2)
