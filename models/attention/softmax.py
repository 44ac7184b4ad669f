"""Softmax attention under a mask: over a sequence itself, or over the states of another (cross-attention).

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, G key/value heads, A head width.
"""

from torch import Tensor

from twohop.models.attention.attend import attend
from twohop.models.attention.base import HeadAttention
from twohop.models.attention.cache import KVCache
from twohop.models.attention.documents import Documents
from twohop.models.attention.masks import Pattern
from twohop.models.attention.rope import Rope, rotate
from twohop.models.config import ModelConfig


class Attention(HeadAttention):
    """Multi-head softmax attention (Vaswani 2017); `pattern` says which keys a query sees."""

    def __init__(self, config: ModelConfig, pattern: Pattern) -> None:
        super().__init__(config)
        self.mask, self.reach = pattern

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None = None,
        cache: KVCache | None = None,
        memory_BSD: Tensor | None = None,
        key_mask_BS: Tensor | None = None,
        memory_rope: Rope | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D].

        Args:
            x_BTD: the positions that ask.
            rope: angles of these positions; None: no rotation.
            cache: x holds the positions after those in the cache, which grows by them. With `memory_BSD`, the cache
                keeps the memory's keys and values after the first call.
            memory_BSD: the states that are attended to in place of x.
            key_mask_BS: bool, False for keys that nobody sees, such as padding; S counts all positions of the cache.
            memory_rope: angles of the memory's positions, which are counted in its own sequence.
            documents: of whole sequences without cache or memory: none sees another.
        """
        q = rotate(self.queries(x_BTD), rope)
        first_query = cache.length if cache is not None and memory_BSD is None else 0
        if cache is not None and cache.length and memory_BSD is not None:
            k, v = cache.kept()
        else:
            k, v = self.keys_values(x_BTD if memory_BSD is None else memory_BSD)
            k = rotate(k, rope if memory_BSD is None else memory_rope)
            if cache is not None:
                k, v = cache.append(k, v)
        num_keys = k.shape[2]
        first_key = 0 if cache is None else cache.length - num_keys
        if key_mask_BS is not None:
            key_mask_BS = key_mask_BS[:, -num_keys:]
        return self.output(self.attend(q, k, v, first_query, first_key, key_mask_BS, documents))

    def attend(
        self,
        q_BHTA: Tensor,
        k_BGSA: Tensor,
        v_BGSA: Tensor,
        first_query: int,
        first_key: int,
        key_mask_BS: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """[B, H, T, A], from queries and keys whose positions begin at the given ones."""
        return attend(q_BHTA, k_BGSA, v_BGSA, self.mask, first_query, first_key, key_mask_BS, documents)

    def new_cache(self, max_len: int) -> KVCache:
        """See `AttentionBase`. Holds no more than `reach` positions beside the new ones."""
        return KVCache(max_len, self.reach)
