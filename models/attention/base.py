"""What all kinds of attention share: rotary positions, and the projections to heads.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, G key/value heads, A head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from twohop.models.config import ModelConfig


def rope_angles(positions_T: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i / A) for i < A/2: [T, A/2] each (Su 2021, RoFormer)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=dtype) / head_dim
    angles = positions_T.to(dtype)[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


def rotate(x_BHTA: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotates the pairs (x_i, x_{i + A/2}) by their angles: the pairing of Llama's and GPT-NeoX's weights.

    None leaves them as they are.
    """
    if rope is None:
        return x_BHTA
    cos, sin = rope
    first, second = x_BHTA.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BHTA.dtype)


class AttentionBase(nn.Module):
    """Projections of queries, keys and values to heads, and of the heads back.

    With fewer key/value heads than heads it is GQA (Ainslie 2023), with one MQA (Shazeer 2019).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.key_dim
        self.wq = nn.Linear(config.dim, config.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * self.head_dim, config.dim, bias=False)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] → [B, H, T, A]."""
        return self._heads(self.wq(x_BTD))

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D] → [B, G, S, A] twice."""
        return self._heads(self.wk(x_BSD)), self._heads(self.wv(x_BSD))

    def output(self, y_BHTA: Tensor) -> Tensor:
        """[B, H, T, A] → [B, T, D]."""
        return self.wo(y_BHTA.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def new_cache(self, max_len: int) -> Any:
        """An empty cache for `max_len` positions, as `forward` takes it; its `length` counts positions seen."""
        raise NotImplementedError
