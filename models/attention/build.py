"""Attention by kind. A kind that is a mask is a line in `PATTERNS`, any other one in `KINDS`."""

from collections.abc import Callable

from torch.nn.attention.flex_attention import and_masks

from twohop.models.attention.base import AttentionBase
from twohop.models.attention.latent import LatentAttention
from twohop.models.attention.linear import LinearAttention
from twohop.models.attention.masks import PATTERNS, Pattern
from twohop.models.attention.masks import causal as causal_mask
from twohop.models.attention.memory import MemoryAttention
from twohop.models.attention.softmax import Attention
from twohop.models.attention.span import SpanAttention
from twohop.models.config import ModelConfig

KINDS: dict[str, Callable[[ModelConfig], AttentionBase]] = {
    "memory": MemoryAttention,
    "linear": LinearAttention,
    "latent": LatentAttention,
    "adaptive_span": SpanAttention,
}


def build_attention(config: ModelConfig, *, causal: bool = True, cross: bool = False, layer: int = 0) -> AttentionBase:
    """Attention of the kind `config.attention.kind` for the block number `layer`.

    `causal`: no position sees a later one. `cross`: for the states of another sequence, all of which are seen whatever
    the kind; pass them to `forward` as `memory_BSD`. Raises ValueError for a kind that is causal by itself and should
    not be.
    """
    kind = config.attention.kind
    if cross:
        return Attention(config, Pattern(None))
    if kind in KINDS:
        if not causal:
            raise ValueError(
                f"model.attention.kind={kind} looks back only, but this model sees its whole input: "
                f"use one of {', '.join(PATTERNS)}"
            )
        return KINDS[kind](config)
    mask, reach = PATTERNS[kind](config, causal, layer)
    if causal:
        mask = causal_mask if mask is None else and_masks(causal_mask, mask)
    return Attention(config, Pattern(mask, reach))
