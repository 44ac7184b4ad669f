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
    """The experts of one MoE layer, and who comes to them."""

    side: str  # encoder or decoder, of a model that has both; "" of others
    tokens: int  # of a sequence
    top_k: int
    num_experts: int
    expert_shapes: tuple[Shape, ...]  # of the parameters of one expert
    capacity_factor: float | None  # while training

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        return sum(math.prod(shape) for shape in self.expert_shapes)

    @property
    def token_flops(self) -> float:
        """Of the experts of one token in the forward pass."""
        return 2.0 * self.top_k * self.expert_size


@dataclass(frozen=True)
class Parameter:
    """One parameter; of a layer's experts that of one expert."""

    shape: Shape
    layer: int  # number of the MoE layer whose experts it belongs to; -1: of none
    block: int  # number of its block, an encoder's first; -1: outside of blocks
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
    layers: tuple[LayerShape, ...]  # MoE layers, an encoder's first
    targets: int  # of a sequence: its tokens, those of its target side, or one class of an image
    target_flops: float  # of the whole model for each of them, forward and backward

    @property
    def dense(self) -> list[Parameter]:
        """All but experts."""
        return [parameter for parameter in self.parameters.values() if parameter.layer < 0]

    @property
    def dense_size(self) -> int:
        """Parameters without experts."""
        return sum(parameter.size for parameter in self.dense)

    @property
    def sequence_flops(self) -> float:
        """Of a whole sequence, forward and backward."""
        return self.targets * self.target_flops


def model_shape(config: ModelConfig, seq_len: int, source_len: int | None) -> ModelShape:
    """Builds the model on the meta device.

    Args:
        config: with vocab_size, and where a router asks for it num_tasks, filled in.
        seq_len: tokens of a sequence, on the target side if there are two; of an image, its patches count instead.
        source_len: tokens on the source side of an encoder-decoder.
    """
    model = build_model(config, device="meta")
    tokens = seq_len if config.vision is None else config.vision.num_patches
    experts, matrices = expert_parameters(model), hidden_matrices(model)
    number = {layer: i for i, (_, layer) in enumerate(model.moe_layers())}
    blocks = {block: i for i, block in enumerate(model.every_block())}
    block_of = {f"{name}.": blocks[module] for name, module in model.named_modules() if module in blocks}
    parameters = {}
    for name, parameter in model.named_parameters():
        is_expert, path = name in experts, name.split(".")
        parameters[name] = Parameter(
            shape=tuple(parameter.shape[1:] if is_expert else parameter.shape),
            layer=number[experts[name]] if is_expert else -1,
            block=next((block for start, block in block_of.items() if name.startswith(start)), -1),
            branch=_branch(path),
            is_matrix=name in matrices,
        )
    layers = []
    for name, layer in model.moe_layers():
        side = name.partition(".")[0] if source_len is not None else ""
        layers.append(
            LayerShape(
                side=side,
                tokens=source_len if side == "encoder" and source_len is not None else tokens,
                top_k=layer.config.router.top_k,
                num_experts=layer.dispatcher.num_experts,
                expert_shapes=tuple(tuple(p.shape[1:]) for p in layer.experts.parameters()),
                capacity_factor=layer.config.capacity_factor,
            )
        )
    total, active = parameter_counts(config)
    flops = training_flops(config, tokens, source_len)
    assert flops is not None  # the length of sources is given
    return ModelShape(config, total, active, parameters, tuple(layers), 1 if config.vision else tokens, flops)


def _branch(path: list[str]) -> str:
    inside = path[path.index("moe") + 1 :] if "moe" in path else [""]
    if inside[0] == "residual":
        return ".".join(inside[:2])
    return inside[0] if inside[0] in ("router", "shared") else ""
