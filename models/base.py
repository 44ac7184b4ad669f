"""What all models have in common.

Shapes: V classes of a target (the vocabulary, for text).
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from twohop.models.attention import AttentionBase
from twohop.models.config import ModelConfig
from twohop.models.moe import MoELayer, MoEStats


class ModelOutput(NamedTuple):
    """Logits of every target, [B, T, V] for the next tokens of text, and the statistics of every MoE layer in order."""

    logits: Tensor
    moe: tuple[MoEStats, ...]
    losses: Mapping[str, Tensor] = MappingProxyType({})  # scalars of other layers, already multiplied by their weights


class MoEModel(nn.Module):
    """A model with MoE layers. A subclass takes (config, dispatchers), one dispatcher for each MoE layer in order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def moe_layers(self) -> Iterator[tuple[str, MoELayer]]:
        """(module name, layer) of every MoE layer, in order."""
        for name, module in self.named_modules():
            if isinstance(module, MoELayer):
                yield name, module

    def every_block(self) -> Iterator[nn.Module]:
        """The blocks of every stack."""
        for module in self.modules():
            if isinstance(module, nn.ModuleList):
                yield from module

    def attention_losses(self) -> dict[str, Tensor]:
        """What all attention layers add to the loss of this forward pass, summed by name; {} for most kinds."""
        total: dict[str, Tensor] = {}
        for module in self.modules():
            if isinstance(module, AttentionBase):
                for name, loss in module.take_losses().items():
                    total[name] = total[name] + loss if name in total else loss
        return total
