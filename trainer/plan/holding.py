"""What a rank holds of a model from step to step, for each engine: weights, moments, masters.

Exact; a rank with an uneven share is taken to be the one with the largest.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from twohop.trainer.config import Precision
from twohop.trainer.plan.passes import Array
from twohop.trainer.plan.shape import ModelShape, Parameter

NUMBER, STEP_COUNT = 4, 4  # bytes of fp32, and of AdamW's count of steps
# Bytes of a parameter, of its gradient, and of a master copy that the optimizer updates in its place.
WIDTHS = {Precision.fp32: (4, 4, 0), Precision.bf16: (4, 4, 0), Precision.bf16_params: (2, 2, 4)}


@dataclass(frozen=True)
class Holder:
    """What one rank of an engine holds of a model.

    Args:
        shape: of the model.
        engine: ddp, fsdp, zero0, zero1 or zero2.
        ep_sizes: of each MoE layer.
        world: ranks.
        precision: of the engine.
        optimizer: adamw or muon.
    """

    shape: ModelShape
    engine: str
    ep_sizes: tuple[int, ...]
    world: int
    precision: Precision
    optimizer: str = "adamw"

    @cached_property
    def local_experts(self) -> Array:
        """Experts of each layer that live here, [L]."""
        pairs = zip(self.shape.layers, self.ep_sizes, strict=True)
        return np.array([layer.num_experts // ep for layer, ep in pairs], dtype=float)

    def local(self, parameter: Parameter) -> float:
        """Numbers of a parameter that a rank computes with."""
        return parameter.size * (self.local_experts[parameter.layer] if parameter.layer >= 0 else 1)

    def replicas(self, parameter: Parameter) -> int:
        """Ranks that compute with the same numbers."""
        return self.world // (self.ep_sizes[parameter.layer] if parameter.layer >= 0 else 1)

    def share(self, parameter: Parameter) -> float:
        """Numbers of a parameter whose moments a rank holds."""
        if self.engine in ("ddp", "zero0"):
            return self.local(parameter)
        if self.engine == "fsdp" and parameter.layer < 0:  # cut along the first dimension, unevenly if need be
            return math.prod(parameter.shape[1:]) * -(-parameter.shape[0] // self.world)
        return self.local(parameter) / self.replicas(parameter)

    @cached_property
    def held(self) -> float:
        """Numbers that a rank computes with."""
        return sum(map(self.local, self.shape.parameters.values()))

    @cached_property
    def shared(self) -> float:
        """Numbers whose moments a rank holds."""
        return sum(map(self.share, self.shape.parameters.values()))

    @cached_property
    def moments(self) -> float:
        """Bytes of the optimizer's state: two moments of each number, or one of Muon's; and of master copies."""
        master = WIDTHS[self.precision][2] or (NUMBER if self.engine in ("zero1", "zero2") else 0)
        state = 0.0
        for parameter in self.shape.parameters.values():
            is_muons = self.optimizer == "muon" and parameter.is_matrix
            state += (NUMBER if is_muons else 2 * NUMBER) * self.share(parameter) + (0 if is_muons else STEP_COUNT)
        return state + master * self.shared

    @property
    def weights(self) -> float:
        """Bytes of the weights, while none are gathered."""
        return WIDTHS[self.precision][0] * (self.shared if self.engine == "fsdp" else self.held)
