"""What planning must know of a model: its parameters, and its arithmetic."""

import math
from dataclasses import dataclass

from twohop.models import ModelConfig, parameter_counts
from twohop.models.build import build_model, expert_parameters
from twohop.models.flops import training_flops
from twohop.trainer.optimizers.muon import hidden_matrices

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerShape:
    """The experts of one MoE layer."""

    num_experts: int
    expert_shapes: tuple[Shape, ...]  # of the parameters of one expert

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        return sum(math.prod(shape) for shape in self.expert_shapes)


@dataclass(frozen=True)
class Parameter:
    """One parameter; of a layer's experts that of one expert."""

    shape: Shape
    layer: int  # number of the MoE layer whose experts it belongs to; -1: of none
    block: int  # number of its block; -1: outside of blocks
    branch: str  # of an MoE layer, that computes by itself: router, shared, residual.mlp, residual.mix; "": none
    is_matrix: bool  # it would be Muon's

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """A model, with nothing allocated."""

    config: ModelConfig
    total: int  # parameters
    active: int  # of these, used by a token
    parameters: dict[str, Parameter]
    layers: tuple[LayerShape, ...]  # MoE layers
    token_flops: float  # forward and backward

    @property
    def dense(self) -> list[Parameter]:
        """All but experts."""
        return [parameter for parameter in self.parameters.values() if parameter.layer < 0]

    @property
    def dense_size(self) -> int:
        """Parameters without experts."""
        return sum(parameter.size for parameter in self.dense)

    def expert_flops(self, layer: LayerShape) -> float:
        """Of one token in the forward pass of a layer's experts."""
        return 2.0 * self.config.moe.router.top_k * layer.expert_size


def model_shape(config: ModelConfig, seq_len: int) -> ModelShape:
    """Builds the model on the meta device."""
    model = build_model(config, device="meta")
    experts, matrices = expert_parameters(model), hidden_matrices(model)
    number = {layer: i for i, (_, layer) in enumerate(model.moe_layers())}
    parameters = {}
    for name, parameter in model.named_parameters():
        is_expert, path = name in experts, name.split(".")
        parameters[name] = Parameter(
            shape=tuple(parameter.shape[1:] if is_expert else parameter.shape),
            layer=number[experts[name]] if is_expert else -1,
            block=int(path[1]) if path[0] == "blocks" else -1,
            branch=_branch(path),
            is_matrix=name in matrices,
        )
    layers = [
        LayerShape(layer.dispatcher.num_experts, tuple(tuple(p.shape[1:]) for p in layer.experts.parameters()))
        for layer in number
    ]
    total, active = parameter_counts(config)
    flops = training_flops(config, seq_len)
    assert flops is not None  # of decoders it is known
    return ModelShape(config, total, active, parameters, tuple(layers), flops)


def _branch(path: list[str]) -> str:
    inside = path[path.index("moe") + 1 :] if "moe" in path else [""]
    if inside[0] == "residual":
        return ".".join(inside[:2])
    return inside[0] if inside[0] in ("router", "shared") else ""
