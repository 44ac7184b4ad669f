"""Attention whose keys and values are projected from one small vector a position (DeepSeek-AI 2024, DeepSeek-V2: MLA).

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A width of a head's query and key,
R width of the latent, P rotated part of A.
"""

import torch
from torch import Tensor, nn

from twohop.models.attention.attend import attend
from twohop.models.attention.base import AttentionBase
from twohop.models.attention.cache import KVCache
from twohop.models.attention.documents import Documents
from twohop.models.attention.masks import causal
from twohop.models.attention.rope import Rope, rotate
from twohop.models.config import ModelConfig

LATENT_EPS = 1e-6  # of the norms of latents, as in DeepSeek's code, where no configuration reaches it


class LatentAttention(AttentionBase):
    """Causal attention with `num_heads` heads, of which the cache holds R + P numbers a position and no more.

    A query has a part that is not rotated and one that is; so has a key, whose rotated part all heads share. Queries
    come from a latent of `q_rank` numbers, or from x itself if that is 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        options = config.attention
        assert options.kv_rank
        assert options.nope_dim
        assert options.rope_dim
        assert options.value_dim
        self.kv_rank, self.nope_dim, self.rope_dim = options.kv_rank, options.nope_dim, options.rope_dim
        self.value_dim, self.num_heads = options.value_dim, config.num_heads
        query_width = config.num_heads * (self.nope_dim + self.rope_dim)
        if options.q_rank:
            self.wq_down: nn.Linear | None = nn.Linear(config.dim, options.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(options.q_rank, LATENT_EPS)
            self.wq = nn.Linear(options.q_rank, query_width, bias=False)
        else:
            self.wq_down = None
            self.wq = nn.Linear(config.dim, query_width, bias=False)
        self.wkv_down = nn.Linear(config.dim, self.kv_rank + self.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(self.kv_rank, LATENT_EPS)
        self.wkv = nn.Linear(self.kv_rank, config.num_heads * (self.nope_dim + self.value_dim), bias=False)
        self.wo = nn.Linear(config.num_heads * self.value_dim, config.dim, bias=False)
        self.score_factor = config.rope_scaling.score_factor

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B, T, D] → [B, T, D]. With a cache, x holds the positions after those in it; `rope` is of width P.

        `documents`, without a cache: none sees another.
        """
        q_latent = x_BTD if self.wq_down is None else self.q_norm(self.wq_down(x_BTD))
        q_nope, q_rope = self._heads(self.wq(q_latent)).split([self.nope_dim, self.rope_dim], -1)
        latent_BTR, k_rope_BTP = self.wkv_down(x_BTD).split([self.kv_rank, self.rope_dim], -1)
        latent_B1SR, k_rope_B1SP = self.kv_norm(latent_BTR)[:, None], rotate(k_rope_BTP[:, None], rope)
        first_query = 0
        if cache is not None:
            first_query = cache.length
            latent_B1SR, k_rope_B1SP = cache.append(latent_B1SR, k_rope_B1SP)
        kv_BHSX = self._heads(self.wkv(latent_B1SR[:, 0]))
        k_nope, v = kv_BHSX.split([self.nope_dim, self.value_dim], -1)
        q_BHTA = torch.cat([q_nope, rotate(q_rope, rope)], -1) * self.score_factor
        k_BHSA = torch.cat([k_nope, k_rope_B1SP.expand(-1, self.num_heads, -1, -1)], -1)
        y_BHTV = attend(q_BHTA, k_BHSA, v, causal, first_query, documents=documents)
        return self.wo(y_BHTV.transpose(1, 2).flatten(2))

    def new_cache(self, max_len: int) -> KVCache:
        """See `AttentionBase`."""
        return KVCache(max_len)

    def _heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
