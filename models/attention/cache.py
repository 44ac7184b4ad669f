"""What an attention layer keeps of the positions that it has seen.

Shapes: B sequences, T new positions, S kept positions, G key/value heads, A head width.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of at most `max_len` positions; with `keep`, of the last `keep` before the new ones alone."""

    def __init__(self, max_len: int, keep: int | None = None) -> None:
        self.length = 0  # positions seen
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
            batch, heads, _, width = k_BGTA.shape
            self._keys = k_BGTA.new_empty(batch, heads, self.max_len, width)
            self._values = v_BGTA.new_empty(batch, heads, self.max_len, width)
        self._keys[:, :, start : self.length] = k_BGTA
        self._values[:, :, start : self.length] = v_BGTA
        return self.states

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """The keys and values that are kept. There must be some."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def _shift(self, old_BGSA: Tensor | None, new_BGTA: Tensor) -> Tensor:
        assert self.keep is not None
        if old_BGSA is None:
            return new_BGTA
        kept = min(self.keep, old_BGSA.shape[2])
        return torch.cat([old_BGSA[:, :, old_BGSA.shape[2] - kept :], new_BGTA], 2)
