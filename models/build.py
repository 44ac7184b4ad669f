"""Models by kind, and what can be known of one without its weights. A new kind is a file and one line in `MODELS`."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from twohop.comm import TokenDispatcher, Topology, build_dispatcher
from twohop.models.base import MoEModel
from twohop.models.config import ModelConfig, ModelKind
from twohop.models.encoder_decoder import EncoderDecoder
from twohop.models.moe import MoELayer
from twohop.models.transformer import Transformer
from twohop.models.vision import VisionTransformer

MODELS: dict[ModelKind, type] = {
    ModelKind.decoder: Transformer,
    ModelKind.encoder_decoder: EncoderDecoder,
    ModelKind.vit: VisionTransformer,
}
MakeDispatcher = Callable[[int, int], TokenDispatcher]


class ParameterCounts(NamedTuple):
    """All parameters of a model, and those that one token uses."""

    total: int
    active: int


def build_model(
    config: ModelConfig, make_dispatcher: MakeDispatcher | None = None, device: torch.device | str | None = None
) -> MoEModel:
    """The model `config.kind`, whose weights are not yet set: call `init_weights`, or load them.

    `make_dispatcher(moe_layer_index, num_experts)` says where each layer's experts live; None keeps all of them in
    this process. Raises ValueError for a configuration that cannot be built.
    """
    dispatchers = [(make_dispatcher or _one_process)(i, n) for i, n in enumerate(config.experts_by_layer)]
    with torch.device("meta"):  # no time spent on initial values that would be thrown away
        model = MODELS[config.kind](config, dispatchers)
    return model.to_empty(device=device or "cpu")


def _one_process(moe_layer_index: int, num_experts: int) -> TokenDispatcher:
    return build_dispatcher("flat", Topology.one_process(), num_experts)


def expert_parameters(model: MoEModel) -> dict[str, MoELayer]:
    """Names of the parameters that are cut over an EP group (first dimension: local experts), with their layers."""
    return {
        f"{layer_name}.experts.{name}": layer
        for layer_name, layer in model.moe_layers()
        for name, _ in layer.experts.named_parameters()
    }


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Parameters of the whole model over all ranks; allocates nothing."""
    model = build_model(config, device="meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for _, layer in model.moe_layers():
        num_experts = layer.dispatcher.num_experts
        expert_size = sum(parameter.numel() for parameter in layer.experts.parameters()) // num_experts
        idle += (num_experts - layer.config.router.top_k) * expert_size
    return ParameterCounts(total, total - idle)
