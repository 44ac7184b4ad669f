"""Fit a cost model to the machines at hand, in at most a few seconds, by running what will run later."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from twohop.comm.build import build_dispatcher
from twohop.comm.cost import CostModel, LevelCost, traffic_of_hop
from twohop.comm.exchange import Channel
from twohop.comm.routes import ROUTES
from twohop.comm.topology import Axis, Topology
from twohop.comm.tree import Bag

SMALL_BYTES, MANY = 1 << 10, 16
FIRST_BYTES, MOST_BYTES = 1 << 18, 1 << 23
MORE_CHUNKS = 7
LARGE_S = 0.15  # the large exchange is sized to take about this long
ROW = 1 << 10  # floats of a copied row: 4 KiB


def fit_cost_model(topology: Topology) -> CostModel:
    """Probe all levels of the topology's EP group. Every rank of the world must call this; all get the same model.

    Takes about a second on an idle machine, and stays below three on a slow network: sizes follow a first look.
    """
    levels = {axis.name: _level(topology, axis) for axis in topology.axes if axis.size > 1}
    copied_byte_s = _copying(topology)
    base_s = {name: _carry_nothing(topology, name, chunks=1) for name in ROUTES}
    more_s = _carry_nothing(topology, "flat", chunks=1 + MORE_CHUNKS) - base_s["flat"]
    return CostModel(levels, copied_byte_s, _exchange_s(topology, levels, more_s), base_s)


def _level(topology: Topology, axis: Axis) -> LevelCost:
    """From one small exchange, many small ones at once, and a large one; all groups along the axis work together."""
    channel = Channel.make(topology, axis.group, "probe", None)
    peers = axis.size - 1

    def exchange(sent_bytes: int, times: int = 1) -> Callable[[], object]:
        to_each = sent_bytes // peers
        splits = [0 if level == "own rank" else to_each for level in channel.levels]
        rows = torch.zeros(sum(splits), dtype=torch.uint8, device=topology.device)
        return lambda: [p.wait() for p in [channel.start(rows, splits, splits, "probe") for _ in range(times)]]

    small_s = _time(topology, exchange(SMALL_BYTES), 5)
    many_s = _time(topology, exchange(SMALL_BYTES, MANY), 5)
    first_s = _time(topology, exchange(FIRST_BYTES), 1)
    size = min(MOST_BYTES, max(FIRST_BYTES, int(FIRST_BYTES * LARGE_S / max(first_s, 1e-6))))
    large_s = _time(topology, exchange(size), 3)
    return LevelCost(
        message_s=max(0.0, many_s - small_s) / (MANY - 1) / peers,
        byte_s=max(0.0, large_s - small_s) / (size - SMALL_BYTES),
    )


def _copying(topology: Topology) -> float:
    """Seconds to copy a byte to a child, and to add it back; the mean of the two."""
    rows = 1 << 9
    index = torch.arange(rows, device=topology.device).flip(0)
    bag = Bag.from_parents(torch.arange(rows, device=topology.device) // 2, index, rows // 2)
    table = torch.ones(rows, ROW, device=topology.device)
    seconds = _time(topology, lambda: bag.sum(table.index_select(0, index)), 5)
    return seconds / (2 * table.numel() * table.element_size())


def _carry_nothing(topology: Topology, route: str, chunks: int) -> float:
    """Seconds of a dispatch and combine with one tiny token for every rank."""
    ids_NK = torch.arange(topology.ep_size, device=topology.device)[:, None]
    tokens_ND = torch.ones(topology.ep_size, 4, device=topology.device)
    weights_NK = torch.ones(topology.ep_size, 1, device=topology.device)
    dispatcher = build_dispatcher(route, topology, topology.ep_size, chunks=chunks, label="probe")
    return _time(topology, lambda: dispatcher.run(tokens_ND, ids_NK, weights_NK, lambda rows, counts: rows), 5)


def _exchange_s(topology: Topology, levels: dict[str, LevelCost], more_s: float) -> float:
    """Processor time of an exchange: what MORE_CHUNKS more of them took, there and back, without their messages."""
    block = [(axis.name, axis.size) for axis in topology.axes if axis.size > 1]
    hop = traffic_of_hop(block, range(len(block))) if block else []
    messages_s = sum(messages * levels[name].message_s for name, messages, _ in hop)
    return max(0.0, more_s / (2 * MORE_CHUNKS) - messages_s)


def _time(topology: Topology, work: Callable[[], object], repeats: int) -> float:
    """Median seconds until the last rank has done `work`, the same number on every rank."""
    work()
    seconds = []
    for _ in range(repeats):
        if topology.world_group is not None:
            dist.barrier(topology.world_group)
        start = time.perf_counter()
        work()
        if topology.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    measured = torch.tensor(seconds, dtype=torch.float64, device=topology.device)
    if topology.world_group is not None:
        dist.all_reduce(measured, dist.ReduceOp.MAX, topology.world_group)
    return statistics.median(measured.tolist())
