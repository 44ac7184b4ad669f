"""Attention by segments with a memory of those before (Dai 2019, Transformer-XL), optionally compressed (Rae 2019).

A position of segment s sees its own segment as far as itself, the `memory` positions before the segment, and of what
came before those the last `compressed` means over `compression` positions. No gradient flows into the past. What a
layer remembers are its own inputs, so all segments of a sequence can pass layer by layer: the result is that of whole
models called segment after segment. In place of the paper's relative positions stands RoPE, which is relative too; a
mean stands at the mean of its positions.

Shapes: B sequences, T new positions, S positions with a key, D model width, H heads, G key/value heads, A head width,
C compressed positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from twohop.models.attention.attend import attend
from twohop.models.attention.base import HeadAttention
from twohop.models.attention.cache import KVCache
from twohop.models.attention.documents import Documents
from twohop.models.attention.masks import causal
from twohop.models.attention.rope import Rope, rope_angles, rotate
from twohop.models.config import ModelConfig


class MemoryCache:
    """The past of one layer: what its next segments may see, and no more."""

    def __init__(self, recent: KVCache, compressed: KVCache) -> None:
        self.recent, self.compressed = recent, compressed

    @property
    def length(self) -> int:
        """Positions seen."""
        return self.recent.length


class Track(NamedTuple):
    """Consecutive keys, rotated, and values."""

    k_BGSA: Tensor
    v_BGSA: Tensor
    first: int  # number of the first one

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Those numbered from `start` to `stop`."""
        window = slice(max(0, start - self.first), max(0, stop - self.first))
        return self.k_BGSA[:, :, window], self.v_BGSA[:, :, window]


class MemoryAttention(HeadAttention):
    """Multi-head softmax attention over segment, memory and compressed memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        options = config.attention
        self.segment, self.memory = options.segment or 1, options.memory or 1
        self.compression, self.compressed = options.compression or 1, options.compressed or 0
        self.rope_theta = config.rope_theta

    separates_documents = False  # segments, memory and means are cut without regard to them

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None = None,
        cache: MemoryCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]. Segments begin at multiples of `segment`, counted from the cache's first position."""
        if documents is not None:
            raise ValueError(
                "model.attention.kind=memory sees across documents: data.document_mask=true needs another kind"
            )
        q = rotate(self.queries(x_BTD), rope)
        start = 0 if cache is None else cache.length
        end = start + x_BTD.shape[1]
        own_k, own_v = self.keys_values(x_BTD)
        # With a cache there is no gradient, and the past is what the cache holds.
        past_k, past_v = (own_k, own_v) if cache is not None else self.keys_values(x_BTD.detach())
        if cache is not None:
            past_k, past_v = own_k, own_v = cache.recent.append(own_k, own_v)
        first = end - own_k.shape[2]
        positions = torch.arange(first, end, device=x_BTD.device)
        own = Track(self._rotated(own_k, positions), own_v, first)
        past = Track(self._rotated(past_k, positions), past_v, first)
        compressed = self._compress(past_k, past_v, first, start, end, cache)
        y = []
        while start < end:
            segment_start = start // self.segment * self.segment
            stop = min(end, segment_start + self.segment)
            q_part, q = q[:, :, : stop - start], q[:, :, stop - start :]
            y.append(self._attend_segment(q_part, own, past, compressed, segment_start, start, stop))
            start = stop
        return self.output(torch.cat(y, 2))

    def _attend_segment(
        self, q_BHTA: Tensor, own: Track, past: Track, compressed: Track, segment_start: int, start: int, stop: int
    ) -> Tensor:
        """The positions from `start` to `stop`, all of one segment: [B, H, T, A]."""
        memory_start = max(0, segment_start - self.memory)
        num_old = memory_start // self.compression
        parts = [
            compressed.part(max(0, num_old - self.compressed), num_old),
            past.part(memory_start, segment_start),
            own.part(segment_start, stop),
        ]
        k, v = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
        # Counted from the segment's start, the past stands before 0 and causality alone lets all of it through.
        num_past = k.shape[2] - (stop - segment_start)
        return attend(q_BHTA, k, v, causal, first_query=start - segment_start, first_key=-num_past)

    def _compress(
        self, k_BGSA: Tensor, v_BGSA: Tensor, first: int, start: int, end: int, cache: MemoryCache | None
    ) -> Track:
        """Means over `compression` keys and values, those that end before `start` from the cache.

        Keys are averaged before they are rotated. Without a norm of keys that is what the projection of the averaged
        states would give: the paper's mean pooling.
        """
        if not self.compressed:
            return Track(k_BGSA[:, :, :0], v_BGSA[:, :, :0], 0)
        rate = self.compression
        new = slice(start // rate * rate - first, end // rate * rate - first)
        k_BGCA, v_BGCA = (x[:, :, new].unflatten(2, (-1, rate)).mean(3) for x in (k_BGSA, v_BGSA))
        if cache is not None:
            k_BGCA, v_BGCA = cache.compressed.append(k_BGCA, v_BGCA)
        number = end // rate - k_BGCA.shape[2]
        blocks = torch.arange(number, end // rate, device=k_BGSA.device)
        return Track(self._rotated(k_BGCA, blocks * rate + (rate - 1) / 2), v_BGCA, number)

    def _rotated(self, k_BGSA: Tensor, positions_S: Tensor) -> Tensor:
        dtype = torch.promote_types(k_BGSA.dtype, torch.float32)
        return rotate(k_BGSA, rope_angles(positions_S, self.head_dim, self.rope_theta, dtype))

    def new_cache(self, max_len: int) -> MemoryCache:
        """See `AttentionBase`. Its size depends on the memory, not on `max_len`."""
        reach = self.memory + self.segment
        return MemoryCache(KVCache(max_len, reach), KVCache(max_len, self.compressed + reach // self.compression))
