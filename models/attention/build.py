"""Attention by kind."""

from twohop.models.attention.masks import causal as causal_mask
from twohop.models.attention.softmax import Attention
from twohop.models.config import ModelConfig


def build_attention(config: ModelConfig, *, causal: bool = True, cross: bool = False, layer: int = 0) -> Attention:
    """Attention for the block number `layer`.

    `causal`: no position sees a later one. `cross`: for the states of another sequence, all of which are seen; pass
    them to `forward` as `memory_BSD`.
    """
    return Attention(config, causal_mask if causal and not cross else None)
