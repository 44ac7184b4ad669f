"""What planning must know of a model: the sizes of its parameters, its arithmetic, and what it keeps for backward."""

import math
from dataclasses import dataclass

from twohop.models import ModelConfig, parameter_counts
from twohop.models.build import build_model, expert_parameters
from twohop.models.flops import training_flops
from twohop.trainer.config import Precision
from twohop.trainer.plan.activations import activation_bytes

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
class ModelShape:
    """A model, with nothing allocated."""

    config: ModelConfig
    total: int  # parameters
    active: int  # of these, used by a token
    dense_shapes: tuple[Shape, ...]  # of all parameters but experts
    block_sizes: tuple[int, ...]  # parameters of each block, without experts; then of what is outside of blocks
    layers: tuple[LayerShape, ...]  # MoE layers
    token_flops: float  # forward and backward
    kept_of_sequence: float  # bytes for the backward pass
    kept_once: float  # bytes for the backward pass, whatever the micro-batch: weights in another precision

    @property
    def dense_size(self) -> int:
        """Parameters without experts."""
        return sum(math.prod(shape) for shape in self.dense_shapes)

    def expert_flops(self, layer: LayerShape) -> float:
        """Of one token in the forward pass of a layer's experts."""
        return 2.0 * self.config.moe.router.top_k * layer.expert_size


def model_shape(config: ModelConfig, seq_len: int, precision: Precision) -> ModelShape:
    """Builds the model on the meta device and runs it on tensors without memory; a few seconds for a large one."""
    model = build_model(config, device="meta")
    experts = expert_parameters(model)
    dense = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in experts}
    inside = [f"blocks.{i}." for i in range(config.num_layers)]
    blocks = [sum(math.prod(s) for name, s in dense.items() if name.startswith(block)) for block in inside]
    outside = sum(math.prod(s) for name, s in dense.items() if not name.startswith("blocks."))
    layers = [
        LayerShape(layer.dispatcher.num_experts, tuple(tuple(p.shape[1:]) for p in layer.experts.parameters()))
        for _, layer in model.moe_layers()
    ]
    total, active = parameter_counts(config)
    flops = training_flops(config, seq_len)
    assert flops is not None  # of decoders it is known
    one, two = (activation_bytes(config, seq_len, n, precision is not Precision.fp32) for n in (1, 2))
    return ModelShape(
        config=config,
        total=total,
        active=active,
        dense_shapes=tuple(dense.values()),
        block_sizes=(*blocks, outside),
        layers=tuple(layers),
        token_flops=flops,
        kept_of_sequence=two - one,
        kept_once=2 * one - two,
    )
