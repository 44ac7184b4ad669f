"""How tokens travel to their experts."""

import math
from dataclasses import dataclass, field
from typing import Any

from twohop.comm.wiring import Wires
from twohop.trainer.config.checks import listed, require


@dataclass
class CommConfig:
    """How tokens travel to their experts."""

    dispatcher: str = "dedup"  # flat | hierarchical | dedup | auto
    chunks: int = 1  # parts of the tokens whose hops and experts overlap; auto chooses by itself
    wire: Wires = field(default_factory=Wires)
    sums_at_home: bool = False  # no bit depends on where experts live, for a row to each expert of a token
    auto_wires: list[str] = field(default_factory=list)  # formats that auto may choose between nodes; []: keeps wire
    cost_file: str | None = None  # auto: predict by this model; null: probe the network at start-up
    ranks_per_node: int | None = None  # null: from torchrun; a number emulates nodes on one host
    # One size for all MoE layers, or a list with one for each; null: the largest that divides a layer's experts and
    # the world, which is min(experts, world) for powers of two. Always a list once validated, empty for null.
    ep_size: Any = None
    init_timeout_s: float = 300.0
    timeout_s: float = 120.0  # deadline of every wait during training

    def __post_init__(self) -> None:
        for key in ("init_timeout_s", "timeout_s"):
            value = getattr(self, key)
            require(value > 0, f"comm.{key}={value}: use a positive number of seconds")
        require(self.chunks >= 1, f"comm.chunks={self.chunks}: use 1 for no overlap, or more")
        for key in ("auto_wires", "cost_file"):
            require(
                self.dispatcher == "auto" or not getattr(self, key),
                f"comm.{key} has no use with comm.dispatcher={self.dispatcher}: add comm=auto or leave it out",
            )
        require(
            self.dispatcher != "auto" or self.chunks == 1,
            f"comm.chunks={self.chunks} has no use with comm=auto, which chooses: leave it out",
        )
        require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            f"comm.ranks_per_node={self.ranks_per_node}: use a positive number, or null for torchrun's value",
        )
        wanted = "null, a whole number of ranks, or a list with one for each MoE layer"
        self.ep_size = listed(self.ep_size, int, "comm.ep_size", wanted)
        for size in self.ep_size:
            require(size >= 1, f"comm.ep_size={self.ep_size}: an expert-parallel size is at least 1")

    def ep_sizes(self, experts_by_layer: list[int], world_size: int) -> list[int]:
        """EP size of each MoE layer, given the layers' expert counts; `validate` has seen that they fit."""
        if len(self.ep_size) == 1:
            return self.ep_size * len(experts_by_layer)
        return self.ep_size or [math.gcd(experts, world_size) for experts in experts_by_layer]
