"""Causal self-attention with rotary positions, grouped key/value heads and a key/value cache.

Shapes: B sequences, T new positions, S positions with a key, D model width, H heads, G key/value heads, A head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.config import ModelConfig


class KVCache:
    """Keys and values that one attention layer has already computed, for at most `max_len` positions."""

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k_BGTA: Tensor, v_BGTA: Tensor) -> tuple[Tensor, Tensor]:
        """Adds T positions and returns all of them: [B, G, S, A] twice."""
        if self._keys is None or self._values is None:
            # Allocated here, where batch size, device and dtype (autocast's, perhaps) are known.
            batch, heads, _, width = k_BGTA.shape
            self._keys = k_BGTA.new_empty(batch, heads, self.max_len, width)
            self._values = v_BGTA.new_empty(batch, heads, self.max_len, width)
        start, self.length = self.length, self.length + k_BGTA.shape[2]
        self._keys[:, :, start : self.length] = k_BGTA
        self._values[:, :, start : self.length] = v_BGTA
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


def rope_angles(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i / A) for i < A/2: [T, A/2] each (Su 2021, RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=dtype) / head_dim
    angles = positions_T.to(dtype)[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BHTA: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (x_i, x_{i + A/2}) by their angles: the pairing of Llama's and GPT-NeoX's weights."""
    cos, sin = rope
    first, second = x_BHTA.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BHTA.dtype)


class Attention(nn.Module):
    """Multi-head attention; with fewer key/value heads than heads it is GQA (Ainslie 2023), with one MQA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.key_dim
        self.wq = nn.Linear(config.dim, config.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """[B, T, D] → [B, T, D]. With a cache, x holds the positions after those in the cache, which grows by them."""
        # [B, T, heads · A] → [B, heads, T, A]
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rope), rotate(k, rope)
        mask_TS = None
        if cache is not None:
            k, v = cache.append(k, v)
            # The T new positions are the last of S.
            num_new, num_keys = q.shape[2], k.shape[2]
            mask_TS = torch.ones(num_new, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_new)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TS, is_causal=mask_TS is None, enable_gqa=True)
        return self.wo(y.transpose(1, 2).flatten(2))
