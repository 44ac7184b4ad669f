"""The encoder-decoder Transformer (Vaswani 2017), with dense or Mixture-of-Experts layers on either side.

Each side has its own MoE layers and routers: by task, by sentence or by token (Kudugunta 2021, Beyond Distillation).
Padding never reaches an MoE layer: it is no token, takes no place in an expert's capacity and balances nothing.

Shapes: B sequences, S source positions, T target positions, D model width, V vocabulary, N tokens without padding.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.comm import TokenDispatcher
from twohop.models.attention import Cache, build_attention, rope_angles
from twohop.models.base import ModelOutput, MoEModel
from twohop.models.config import ModelConfig
from twohop.models.feed_forward import FeedForward
from twohop.models.moe import MoELayer, MoEStats
from twohop.models.routers import TokenInfo

Rope = tuple[Tensor, Tensor]


class Source(NamedTuple):
    """What the encoder made of the sources."""

    states_BSD: Tensor
    rope: Rope  # angles of their positions
    mask_BS: Tensor  # bool, False: padding
    task_B: Tensor | None
    sentence_BD: Tensor  # mean state of each source: what a sentence-level gate of the decoder sees
    moe: tuple[MoEStats, ...]


class DecoderCache(NamedTuple):
    """Keys and values of the target positions so far, and of the source, in one block."""

    own: Cache
    source: Cache


class SideBlock(nn.Module):
    """A block of either side: attention, in the decoder also to the source, then a dense MLP or an MoE layer."""

    def __init__(self, config: ModelConfig, layer: int, dispatcher: TokenDispatcher | None, is_decoder: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, causal=is_decoder, layer=layer)
        if is_decoder:
            self.cross_norm = nn.RMSNorm(config.dim, config.norm_eps)
            self.cross_attention = build_attention(config, cross=True, layer=layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        if dispatcher is not None:
            self.moe = MoELayer(config, dispatcher)
        else:
            ffn_dim = config.ffn_dims[layer] if config.ffn_dims else config.ffn_dim
            self.mlp = FeedForward(config.dim, ffn_dim, config.activation)
        self.is_moe = dispatcher is not None

    def forward(
        self,
        x_BTD: Tensor,
        rope: Rope,
        about: TokenInfo,
        mask_BT: Tensor | None,
        source: Source | None = None,
        cache: DecoderCache | None = None,
    ) -> tuple[Tensor, MoEStats | None]:
        """[B, T, D] → [B, T, D], and the MoE layer's statistics if there is one.

        `mask_BT` is False for padding, which nobody looks at and no MoE layer sees; a decoder's is behind its targets,
        so that the causal mask hides it already. With a `source` this is a block of the decoder.
        """
        h_BTD = self.attention_norm(x_BTD)
        if source is None:
            x_BTD = x_BTD + self.attention(h_BTD, rope, key_mask_BS=mask_BT)
        else:
            own, kept = cache or (None, None)
            x_BTD = x_BTD + self.attention(h_BTD, rope, own)
            h_BTD = self.cross_norm(x_BTD)
            # Positions of both sides are counted alike: a query finds by its own position what stands there, or near.
            x_BTD = x_BTD + self.cross_attention(
                h_BTD, rope, kept, source.states_BSD, source.mask_BS, memory_rope=source.rope
            )
        y_BTD, stats = self._feed(self.ffn_norm(x_BTD), about, mask_BT)
        return x_BTD + y_BTD, stats

    def _feed(self, h_BTD: Tensor, about: TokenInfo, mask_BT: Tensor | None) -> tuple[Tensor, MoEStats | None]:
        if not self.is_moe:
            return self.mlp(h_BTD), None
        if mask_BT is None:
            return self.moe(h_BTD, about)
        y_1ND, stats = self.moe(h_BTD[mask_BT][None], about)
        return y_1ND.new_zeros(h_BTD.shape).masked_scatter(mask_BT[..., None], y_1ND), stats


class EncoderDecoder(MoEModel):
    """Source and target ids to the logits of the next target token. Make it with `build_model`."""

    def __init__(self, config: ModelConfig, dispatchers: Sequence[TokenDispatcher]) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is null: set it to the size of the tokenizer's vocabulary")
        remaining = iter(dispatchers)

        def blocks(side: ModelConfig, is_decoder: bool) -> nn.ModuleList:
            return nn.ModuleList(
                SideBlock(side, layer, next(remaining) if experts else None, is_decoder)
                for layer, experts in enumerate(side.experts_by_block)
            )

        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.encoder = blocks(config.encoder_stack, is_decoder=False)
        self.encoder_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.decoder = blocks(config, is_decoder=True)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(
        self,
        source_BS: Tensor,
        source_length_B: Tensor,
        ids_BT: Tensor,
        length_B: Tensor | None = None,
        task_B: Tensor | None = None,
        sample_B: Tensor | None = None,
    ) -> ModelOutput:
        """Teacher forcing: logits [B, T, V] of the token after each of `ids_BT`; encoder's statistics first.

        Args:
            source_BS: int64 ids, padded behind `source_length_B`.
            source_length_B: int64, at least 1.
            ids_BT: int64 ids of the target so far, padded behind `length_B`.
            length_B: int64, at least 1; None: no padding.
            task_B: int64, for routers by task.
            sample_B: int64 numbers in the data set, for routers that remember.

        With expert parallelism every rank of each layer's EP group must call this. Raises ValueError past max_seq_len.
        """
        source = self.encode(source_BS, source_length_B, task_B, sample_B)
        return self.decode(ids_BT, source, length_B=length_B, sample_B=sample_B)

    def encode(
        self,
        source_BS: Tensor,
        source_length_B: Tensor,
        task_B: Tensor | None = None,
        sample_B: Tensor | None = None,
    ) -> Source:
        """The sources' states, once for all steps of decoding; arguments as in `forward`, and as collective."""
        mask_BS = _mask(source_BS, source_length_B)
        x_BSD, rope = self._embed(source_BS, 0)
        about = TokenInfo(
            len(source_BS), source_BS[mask_BS][None], task_B=task_B, sample_B=sample_B, length_B=source_length_B
        )
        moe = []
        for block in self.encoder:
            x_BSD, stats = block(x_BSD, rope, about, mask_BS)
            moe += [stats] if stats is not None else []
        states_BSD = self.encoder_norm(x_BSD)
        total_BD = (states_BSD * mask_BS[..., None]).sum(1)
        return Source(states_BSD, rope, mask_BS, task_B, total_BD / source_length_B[:, None], tuple(moe))

    def decode(
        self,
        ids_BT: Tensor,
        source: Source,
        cache: list[DecoderCache] | None = None,
        length_B: Tensor | None = None,
        sample_B: Tensor | None = None,
    ) -> ModelOutput:
        """Logits after each of `ids_BT`; with a cache (see `new_cache`), ids continue the positions in it."""
        start = cache[0].own.length if cache else 0
        mask_BT = None if length_B is None else _mask(ids_BT, length_B)
        x_BTD, rope = self._embed(ids_BT, start)
        tokens = ids_BT if mask_BT is None else ids_BT[mask_BT][None]
        about = TokenInfo(len(ids_BT), tokens, source.task_B, sample_B, length_B, source.sentence_BD)
        moe = list(source.moe) if start == 0 else []
        for i, block in enumerate(self.decoder):
            x_BTD, stats = block(x_BTD, rope, about, mask_BT, source, cache[i] if cache else None)
            moe += [stats] if stats is not None else []
        # Tied by use, not by one parameter in two modules: so the tie survives moving off the meta device.
        head_VD = self.embed.weight if self.head is None else self.head.weight
        return ModelOutput(F.linear(self.norm(x_BTD), head_VD), tuple(moe), self.attention_losses())

    def new_cache(self, source_len: int, max_len: int) -> list[DecoderCache]:
        """An empty cache for sources of `source_len` positions and targets of at most `max_len`."""
        blocks = cast(list[SideBlock], list(self.decoder))
        return [DecoderCache(b.attention.new_cache(max_len), b.cross_attention.new_cache(source_len)) for b in blocks]

    def _embed(self, ids_BT: Tensor, start: int) -> tuple[Tensor, Rope]:
        end = start + ids_BT.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {end} tokens is longer than model.max_seq_len={self.config.max_seq_len}: "
                "shorten it, or train with a larger max_seq_len"
            )
        x_BTD = self.embed(ids_BT)
        angle_dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        positions_T = torch.arange(start, end, device=ids_BT.device)
        # RoPE shows distances alone; places themselves are in the states.
        sinusoids_TD = torch.cat(rope_angles(positions_T, self.config.dim, 10_000.0, angle_dtype), -1)
        x_BTD = x_BTD * self.config.dim**0.5 + sinusoids_TD.to(x_BTD.dtype)
        return x_BTD, rope_angles(
            positions_T, self.config.key_dim, self.config.rope_theta, angle_dtype, self.config.rope_scaling
        )


@torch.no_grad()
def translate(
    model: EncoderDecoder,
    source_BS: Tensor,
    source_length_B: Tensor,
    task_B: Tensor | None,
    max_new_tokens: int,
    end: int,
) -> Tensor:
    """The most probable token after each other, for every source: int64 [B, at most max_new_tokens].

    Ends when all targets have ended; behind the first `end` of a target stand only more of it. The model is in
    evaluation mode meanwhile. With expert parallelism this is collective, and every rank needs the same sources.
    """
    was_training = model.training
    model.eval()
    source = model.encode(source_BS, source_length_B, task_B)
    cache = model.new_cache(source_BS.shape[1], max_new_tokens)
    new_B1 = source_BS.new_full((len(source_BS), 1), end)
    has_ended_B1 = torch.zeros_like(new_B1, dtype=torch.bool)
    ids = []
    for _ in range(max_new_tokens):
        new_B1 = model.decode(new_B1, source, cache).logits.argmax(-1).masked_fill(has_ended_B1, end)
        ids.append(new_B1)
        has_ended_B1 |= new_B1 == end
        if has_ended_B1.all():
            break
    model.train(was_training)
    return torch.cat(ids, 1)


def _mask(ids_BT: Tensor, length_B: Tensor) -> Tensor:
    """Bool [B, T], False behind each sequence's length."""
    return torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B[:, None]
