"""Softmax attention under a mask: over a sequence itself, or over the states of another (cross-attention).

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, G key/value heads, A head width.
"""

from torch import Tensor

from twohop.models.attention.base import AttentionBase, rotate
from twohop.models.attention.cache import KVCache
from twohop.models.attention.masks import MaskMod, attend
from twohop.models.config import ModelConfig


class Attention(AttentionBase):
    """Multi-head softmax attention. `mask` says which keys a query sees; None: all."""

    def __init__(self, config: ModelConfig, mask: MaskMod | None) -> None:
        super().__init__(config)
        self.mask = mask

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        memory_BSD: Tensor | None = None,
        key_mask_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D].

        Args:
            x_BTD: the positions that ask.
            rope: angles of these positions; None: no rotation.
            cache: x holds the positions after those in the cache, which grows by them. With `memory_BSD`, the cache
                keeps the memory's keys and values after the first call.
            memory_BSD: the states that are attended to, in place of x itself; they are not rotated.
            key_mask_BS: bool, False for keys that nobody sees, such as padding; S counts the cache's positions too.
        """
        if memory_BSD is not None and rope is not None:
            raise ValueError("rope is given for states of another sequence, which has positions of its own: use None")
        q = rotate(self.queries(x_BTD), rope)
        first_query = 0
        if memory_BSD is not None and cache is not None and cache.length:
            k, v = cache.states
        else:
            k, v = self.keys_values(x_BTD if memory_BSD is None else memory_BSD)
            k = rotate(k, rope)
            if cache is not None:
                first_query = cache.length if memory_BSD is None else 0
                k, v = cache.append(k, v)
        first_key = 0 if cache is None else cache.length - k.shape[2]
        return self.output(attend(q, k, v, self.mask, first_query, first_key, key_mask_BS))

    def new_cache(self, max_len: int) -> KVCache:
        """See `AttentionBase`."""
        return KVCache(max_len)
