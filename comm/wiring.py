"""Which wire format each hop and direction uses, by name; the formats themselves are in `twohop.comm.wire`.

Imports no torch: these dataclasses are also the configuration's.
"""

from dataclasses import dataclass, field, replace
from enum import Enum


class Direction(Enum):
    """What a row is on its way for."""

    dispatch = "dispatch"
    combine = "combine"
    dispatch_backward = "dispatch backward"
    combine_backward = "combine backward"


@dataclass
class HopWires:
    """The format of each kind of hop: fp32 (rows as they are), bf16, fp8, fp8_128 or int8."""

    inside: str = "fp32"  # inside a node
    between: str = "fp32"  # between nodes; also of a flat exchange that leaves the node


@dataclass
class Wires:
    """The formats of a dispatcher, for each direction, forward and backward apart."""

    dispatch: HopWires = field(default_factory=HopWires)
    combine: HopWires = field(default_factory=HopWires)
    dispatch_backward: HopWires = field(default_factory=HopWires)
    combine_backward: HopWires = field(default_factory=HopWires)

    @classmethod
    def uniform(cls, inside: str, between: str) -> "Wires":
        """The same for all directions."""
        return cls(**{direction.name: HopWires(inside, between) for direction in Direction})

    def of(self, direction: Direction) -> HopWires:
        """The formats of one direction."""
        hop: HopWires = getattr(self, direction.name)
        return hop

    def with_between(self, between: str) -> "Wires":
        """The same, with another format on all hops between nodes."""
        return Wires(**{d.name: replace(self.of(d), between=between) for d in Direction})

    def __str__(self) -> str:
        """Short, for errors: inside/between of each direction, or of all."""
        formats = {d.value: f"{self.of(d).inside}/{self.of(d).between}" for d in Direction}
        if len(set(formats.values())) == 1:
            return f"{formats[Direction.dispatch.value]} on the wire"
        return ", ".join(f"{value} for {name}" for name, value in formats.items())
