"""The way that tokens are carried: a route, cut into chunks, encoded. `auto` chooses it by predicted time."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from twohop.comm.clock import PhaseClock
from twohop.comm.cost import CostModel, Workload
from twohop.comm.exchange import Channel
from twohop.comm.routes import ROUTES, Hop
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter
from twohop.comm.wire import format_of
from twohop.comm.wiring import Direction, Wires

Hops = tuple[tuple[Hop, Channel], ...]


@dataclass(frozen=True)
class Way:
    """How tokens are carried."""

    name: str  # of the route
    hops: Hops
    chunks: int
    wires: Wires


Chooser = Callable[[int, int, int, torch.dtype], Way]  # (most tokens of a rank, K, D, dtype) -> way


@dataclass(frozen=True)
class AutoOptions:
    """What `auto` chooses by, and from what."""

    model: CostModel
    tokens: int = 0  # of a rank, expected at the first call; later calls know
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16)
    between_wires: tuple[str, ...] = ()  # formats that it may use between nodes; none: it keeps the given wires


def hops_of(name: str, topology: Topology, label: str, meter: TrafficMeter | None, clock: PhaseClock) -> Hops:
    """The hops of a route, each with its channel."""
    axes = [axis for axis in topology.axes if axis.size > 1]  # a level of one rank has nothing to exchange
    hops = []
    for hop in ROUTES[name](len(axes)) if axes else []:
        group = axes[hop.exchange[0]].group if len(hop.exchange) == 1 else topology.ep_group
        hops.append((hop, Channel.make(topology, group, label, meter, f"{name} dispatch", clock)))
    return tuple(hops)


def by_cost(topology: Topology, num_experts: int, wires: Wires, hops: dict[str, Hops], options: AutoOptions) -> Chooser:
    """Chooses by predicted time: a function of its arguments alone, which all ranks know alike."""
    block = [(axis.name, axis.size) for axis in topology.axes]
    candidates = [wires.with_between(name) for name in options.between_wires] or [wires]

    @functools.cache
    def choose(size_class: int, k: int, d: int, dtype: torch.dtype) -> Way:
        choices = []
        for used in candidates:
            inside, between = (format_of(used, Direction.dispatch, crosses) for crosses in (False, True))
            work = Workload(
                tokens=2**size_class,
                top_k=k,
                num_experts=num_experts,
                row_bytes=d * dtype.itemsize,
                between_row_bytes=between.row_bytes(d, dtype),
                inside_row_bytes=inside.row_bytes(d, dtype),
            )
            choices.append((options.model.choose(work, block, ROUTES, options.chunks), used))
        choice, used = min(choices, key=lambda pair: pair[0].seconds)
        return Way(choice.algorithm, hops[choice.algorithm], choice.chunks, used)

    # Sizes are taken to the next power of two, so that small changes do not change the way.
    return lambda most_tokens, k, d, dtype: choose(max(0, most_tokens - 1).bit_length(), k, d, dtype)
