"""Bytes that a rank holds, by part, for each engine.

Parameters, gradients and moments are exact: AdamW keeps two moments for each number and a step count for each
parameter. A rank with an uneven share is taken to be the one with the largest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from twohop.trainer.config import Precision
from twohop.trainer.plan.shape import ModelShape, Shape

NUMBER, STEP_COUNT = 4, 4  # bytes of fp32
BUCKET = 32 << 20  # of the engines' messages
# Bytes of a parameter, of its gradient, and of a master copy that the optimizer updates in its place.
WIDTHS = {Precision.fp32: (4, 4, 0), Precision.bf16: (4, 4, 0), Precision.bf16_params: (2, 2, 4)}


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    weights: float
    gradients: float
    moments: float  # and master copies
    activations: float
    dispatch: float  # rows on their way, and the plans of all layers
    buffers: float  # weights that are gathered, or gradients that are sent

    @property
    def peak(self) -> float:
        """In the backward pass, or afterwards, when gradients are sent and activations are gone."""
        return self.weights + self.gradients + self.moments + max(self.activations + self.dispatch, self.buffers)


def memory_of(
    shape: ModelShape,
    engine: str,
    ep_sizes: Sequence[int],
    world: int,
    micro_batch: int,
    seq_len: int,
    precision: Precision,
    accumulates: bool,
    crossings: float,
) -> Memory:
    """Memory of a rank.

    Args:
        shape: of the model.
        engine: ddp, fsdp, zero0, zero1 or zero2.
        ep_sizes: of each MoE layer.
        world: ranks.
        micro_batch: sequences.
        seq_len: tokens of a sequence.
        precision: of the engine.
        accumulates: a step has more than one micro-batch.
        crossings: bytes of rows that a rank sends and receives in the largest layer's dispatch.
    """
    weight, gradient, master = WIDTHS[precision]
    held = parameters_held(shape, "ddp", ep_sizes, world)
    shared = parameters_held(shape, engine, ep_sizes, world)
    weights = shared if engine == "fsdp" else held
    # FSDP keeps whole gradients until the last micro-batch; ZeRO-2 shares them out at once.
    gradients = shared if engine == "zero2" or (engine == "fsdp" and not accumulates) else held
    copies = master or (NUMBER if engine in ("zero1", "zero2") else 0)  # DeepSpeed updates a flat copy of its part
    names = len(shape.dense_shapes) + sum(len(layer.expert_shapes) for layer in shape.layers)
    if engine == "fsdp":  # a block at work and the next, which is on its way
        largest = [*sorted(shape.block_sizes[:-1])[-2:], shape.block_sizes[-1]]
        buffers: float = sum(largest) * (2 if precision is not Precision.fp32 else NUMBER)
    else:
        buffers = gradient * held if engine == "ddp" and world > 1 else 2 * BUCKET
    rows = micro_batch * seq_len * shape.config.moe.router.top_k
    local_experts = sum(
        (layer.num_experts // ep - 1) * layer.expert_size for layer, ep in zip(shape.layers, ep_sizes, strict=True)
    )
    kept = micro_batch * shape.kept_of_sequence
    if precision is Precision.bf16:  # autocast keeps bf16 copies of the weights
        kept += shape.kept_once + 2 * local_experts
    return Memory(
        weights=weight * weights,
        gradients=gradient * gradients,
        moments=(2 * NUMBER + copies) * shared + STEP_COUNT * names,
        activations=kept,
        dispatch=crossings + len(shape.layers) * plan_bytes(rows),
        buffers=buffers,
    )


def parameters_held(shape: ModelShape, engine: str, ep_sizes: Sequence[int], world: int) -> float:
    """Numbers of which a rank holds the optimizer's state: with ddp and zero0, all that it computes with."""
    layers = list(zip(shape.layers, ep_sizes, strict=True))
    local = [layer.num_experts // ep * layer.expert_size for layer, ep in layers]
    if engine in ("ddp", "zero0"):
        return shape.dense_size + sum(local)
    if engine == "fsdp":  # cut along the first dimension, unevenly if need be; experts along another, evenly
        dense: float = sum(_first_share(dense_shape, world) for dense_shape in shape.dense_shapes)
    else:
        dense = shape.dense_size / world
    return dense + sum(numbers / (world // ep) for numbers, (_, ep) in zip(local, layers, strict=True))


def _first_share(shape: Shape, parts: int) -> int:
    return math.prod(shape[1:]) * -(-shape[0] // parts)


def plan_bytes(assignments: float) -> float:
    """Indices of a plan that are kept for the backward pass: about ten of 8 bytes for each assignment."""
    return 80 * assignments
