"""The decoder-only Transformer, with dense or Mixture-of-Experts feed-forward layers.

Shapes: B sequences, T positions, D model width, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.comm import TokenDispatcher
from twohop.models.attention import AttentionBase, Cache, Documents, build_attention, rope_angles
from twohop.models.base import ModelOutput, MoEModel
from twohop.models.config import ModelConfig
from twohop.models.feed_forward import FeedForward
from twohop.models.moe import MoELayer, MoEStats
from twohop.models.routers import TokenInfo


class Block(nn.Module):
    """Attention, then a dense MLP or an MoE layer, each after a norm and beside the residual stream."""

    def __init__(
        self, config: ModelConfig, dispatcher: TokenDispatcher | None, layer: int = 0, causal: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, causal=causal, layer=layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.left_out = False  # while training: see `twohop.models.layer_drop`
        self.is_moe = dispatcher is not None
        if dispatcher is not None:
            self.moe = MoELayer(config, dispatcher)
        else:
            self.mlp = FeedForward(config.dim, config.ffn_dim, config.activation)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        about: TokenInfo,
        cache: Cache | None = None,
        documents: Documents | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        """[B, T, D] → [B, T, D], and the MoE layer's statistics if there is one."""
        if self.left_out and self.training:
            return x_BTD, self.moe.idle() if self.is_moe else None
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope, cache, documents=documents)
        h_BTD = self.ffn_norm(x_BTD)
        y_BTD, stats = self.moe(h_BTD, about) if self.is_moe else (self.mlp(h_BTD), None)
        return x_BTD + y_BTD, stats


class Transformer(MoEModel):
    """Token ids to next-token logits. Make it with `build_model`; `dispatchers` has one for each MoE layer."""

    def __init__(self, config: ModelConfig, dispatchers: Sequence[TokenDispatcher]) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is null: set it to the size of the tokenizer's vocabulary")
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        remaining = iter(dispatchers)
        self.blocks = nn.ModuleList(
            Block(config, next(remaining) if num_experts else None, layer)
            for layer, num_experts in enumerate(config.experts_by_block)
        )
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self,
        ids_BT: Tensor,
        cache: list[Cache] | None = None,
        sample_B: Tensor | None = None,
        document_BT: Tensor | None = None,
    ) -> ModelOutput:
        """int64 [B, T] → `ModelOutput`. With a cache (see `new_cache`), ids continue the positions in it.

        `sample_B` numbers the sequences in their data set, for routers that remember. `document_BT` numbers the
        documents of every sequence, each of which is then treated as if it stood alone; not with a cache.

        With expert parallelism every rank of each layer's EP group must call this. Raises ValueError past max_seq_len.
        """
        start = cache[0].length if cache else 0
        end = start + ids_BT.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {end} tokens is longer than model.max_seq_len={self.config.max_seq_len}: "
                "shorten it, or train with a larger max_seq_len"
            )
        x_BTD = self.embed(ids_BT)
        angle_dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        positions = torch.arange(start, end, device=ids_BT.device)
        documents = None
        if document_BT is not None:
            documents = Documents(document_BT)
            positions = documents.position_BT[:, None]  # the same for all heads
        rope = rope_angles(
            positions, self.config.rotary_dim, self.config.rope_theta, angle_dtype, self.config.rope_scaling
        )
        about = TokenInfo(len(ids_BT), token_BT=ids_BT, sample_B=sample_B)
        moe = []
        for i, block in enumerate(self.blocks):
            x_BTD, stats = block(x_BTD, rope, about, cache[i] if cache else None, documents)
            if stats is not None:
                moe.append(stats)
        return ModelOutput(self.read_out(x_BTD), tuple(moe), self.attention_losses())

    def read_out(self, x: Tensor) -> Tensor:
        """The logits of states after a block, the last or an earlier one: [..., D] → [..., V]."""
        # Tied by use, not by one parameter in two modules: so the tie survives moving off the meta device.
        head_VD = self.embed.weight if self.head is None else self.head.weight
        return F.linear(self.norm(x), head_VD)

    def new_cache(self, max_len: int) -> list[Cache]:
        """An empty cache of every attention layer, for `max_len` positions."""
        return [module.new_cache(max_len) for module in self.modules() if isinstance(module, AttentionBase)]
