"""Dispatchers by name."""

from twohop.comm.clock import PhaseClock
from twohop.comm.dispatcher import TokenDispatcher
from twohop.comm.routes import ROUTES
from twohop.comm.sums_at_home import SumsAtHome
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter
from twohop.comm.way import AutoOptions, Way, by_cost, hops_of
from twohop.comm.wire import check_wires
from twohop.comm.wiring import Wires


def build_dispatcher(
    name: str,
    topology: Topology,
    num_experts: int,
    *,
    chunks: int = 1,
    wires: Wires | None = None,
    label: str = "",
    meter: TrafficMeter | None = None,
    clock: PhaseClock | None = None,
    auto: AutoOptions | None = None,
    sums_at_home: bool = False,
) -> TokenDispatcher:
    """Make the dispatcher `name`: flat, hierarchical, dedup, or auto. Makes no communication.

    Args:
        topology: its EP group shares the experts.
        num_experts: in the whole layer; a multiple of topology.ep_size.
        chunks: into how many `run` cuts the tokens to overlap their hops; the same on all ranks. `auto` chooses.
        wires: how rows are encoded on each hop; None sends them as they are.
        label: names the layer in errors.
        meter: counts what is sent.
        clock: times dispatch, experts, combine and the waits of exchanges.
        auto: what `auto` chooses by; the same on all ranks.
        sums_at_home: no bit of a result shall depend on where experts live; see `SumsAtHome`.

    Raises:
        ValueError: an unknown name or wire format, experts that the EP group cannot share evenly,
            or auto without its options.
    """
    if name not in (*ROUTES, "auto"):
        raise ValueError(f"unknown dispatcher {name!r}: use one of {', '.join(ROUTES)}, auto")
    if num_experts % topology.ep_size:
        raise ValueError(
            f"{num_experts} experts cannot be shared by {topology.ep_size} expert-parallel ranks: "
            f"use an EP size that divides {num_experts}"
        )
    if chunks < 1:
        raise ValueError(f"chunks={chunks}: use 1 for no overlap, or more")
    wires, clock = wires or Wires(), clock or PhaseClock()
    check_wires(wires)
    make = SumsAtHome if sums_at_home else TokenDispatcher
    if name != "auto":
        way = Way(name, hops_of(name, topology, label, meter, clock), chunks, wires)
        return make(topology, num_experts, label, lambda *_: way, 0, clock)
    if auto is None:
        raise ValueError("dispatcher auto needs AutoOptions: fit a cost model or load one")
    hops = {name: hops_of(name, topology, label, meter, clock) for name in ROUTES}
    choose = by_cost(topology, num_experts, wires, hops, auto)
    return make(topology, num_experts, label, choose, auto.tokens, clock)
