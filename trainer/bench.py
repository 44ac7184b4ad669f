"""The worker of `twohop bench dispatch`: every way to carry tokens on a grid of sizes, predicted and measured."""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table

from twohop.comm import CostModel, TokenDispatcher, Topology, TrafficMeter, build_dispatcher, fit_cost_model
from twohop.comm.cost import Workload
from twohop.trainer.config import BenchConfig, CommConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.world import join_world, leave_world, rank


@dataclass
class Timing:
    """One way at one place of the grid; times in seconds, bytes and messages of all ranks together."""

    tokens: int
    top_k: int
    dim: int
    algorithm: str
    chunks: int
    predicted_s: float
    measured_s: float
    between_nodes_bytes: int


def bench_dispatch(config: BenchConfig, directory: Path | None) -> dict[str, Any]:
    """Time the grid. Every rank must call this; rank 0 prints the table and returns the regrets."""
    device = join_world(CommConfig(timeout_s=config.timeout_s))
    try:
        topology = Topology.discover(config.ranks_per_node, timeout_s=config.timeout_s)
        if config.experts % topology.ep_size:
            raise ConfigError(f"experts={config.experts} cannot be shared by {topology.ep_size} ranks: use a multiple")
        started = time.perf_counter()
        model = CostModel.load(Path(config.cost_file)) if config.cost_file else fit_cost_model(topology)
        probe_s = time.perf_counter() - started
        timings = [
            timing
            for tokens, top_k, dim in product(config.tokens, config.top_k, config.dim)
            for timing in _time_place(topology, config, model, tokens, top_k, dim, device)
        ]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    leave_world()
    if rank() != 0 or topology.rank != 0:
        return {}
    return _report(config, topology, model, probe_s, timings)


def _time_place(
    topology: Topology,
    config: BenchConfig,
    model: CostModel,
    tokens: int,
    top_k: int,
    dim: int,
    device: torch.device,
) -> list[Timing]:
    """All ways at one place of the grid, in turn, with uniform random routing; medians over the repeats."""
    generator = torch.Generator().manual_seed(topology.rank)
    x_ND = torch.randn(tokens, dim, generator=generator).to(device).requires_grad_(config.backward)
    ids_NK = torch.rand(tokens, config.experts, generator=generator).topk(top_k).indices.to(device)
    weights_NK = torch.full((tokens, top_k), 1 / top_k, device=device, requires_grad=config.backward)
    ways = list(product(config.algorithms, config.chunks))
    meters = [TrafficMeter() for _ in ways]
    dispatchers = [
        build_dispatcher(name, topology, config.experts, chunks=chunks, meter=meter)
        for (name, chunks), meter in zip(ways, meters, strict=True)
    ]
    seconds = torch.zeros(len(ways), config.repeats, dtype=torch.float64)
    for repeat in range(-1, config.repeats):  # the first round warms up
        for i, dispatcher in enumerate(dispatchers):
            meters[i].reset()
            if topology.world_size > 1:
                dist.barrier()
            start = time.perf_counter()
            _carry(dispatcher, x_ND, ids_NK, weights_NK, config.backward)
            seconds[i, repeat] = time.perf_counter() - start
    crossed = torch.tensor([meter.bytes_sent("between nodes") for meter in meters])
    if topology.world_size > 1:
        seconds, crossed = seconds.to(topology.device), crossed.to(topology.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(crossed)

    row_bytes = dim * x_ND.element_size()
    work = Workload(tokens, top_k, config.experts, row_bytes, row_bytes, row_bytes)
    block = [(axis.name, axis.size) for axis in topology.axes]
    passes = 2 if config.backward else 1  # the backward takes the same hops
    return [
        Timing(
            tokens,
            top_k,
            dim,
            name,
            chunks,
            predicted_s=passes * model.predict(work, block, name, chunks),
            measured_s=seconds[i].median().item(),
            between_nodes_bytes=int(crossed[i]),
        )
        for i, (name, chunks) in enumerate(ways)
    ]


def _carry(
    dispatcher: TokenDispatcher,
    x_ND: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    backward: bool,
) -> None:
    y_ND, _ = dispatcher.run(x_ND, ids_NK, weights_NK, lambda rows, counts: rows)
    if backward:
        y_ND.backward(y_ND.detach())
    if x_ND.is_cuda:
        torch.cuda.synchronize()


def _report(
    config: BenchConfig, topology: Topology, model: CostModel, probe_s: float, timings: list[Timing]
) -> dict[str, Any]:
    """Table, files and regrets: how much slower than the best way the predicted best one is."""
    ways = len(config.algorithms) * len(config.chunks)
    places = [timings[i : i + ways] for i in range(0, len(timings), ways)]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        title=f"dispatch and combine, {'forward and backward' if config.backward else 'forward'}",
    )
    for column in ("tokens", "K", "D", "way", "model ms", "ms", "MB out", ""):
        table.add_column(column, justify="left" if column in ("way", "") else "right", no_wrap=True)
    regrets = []
    for place in places:
        best = min(place, key=lambda t: t.measured_s)
        chosen = min(place, key=lambda t: t.predicted_s)
        regrets.append(chosen.measured_s / best.measured_s - 1)
        for t in place:
            marks = [word for word, is_it in (("best", t is best), ("chosen", t is chosen)) if is_it]
            row = (str(t.tokens), str(t.top_k), str(t.dim), f"{t.algorithm} x {t.chunks}")
            times = (f"{t.predicted_s * 1e3:.1f}", f"{t.measured_s * 1e3:.1f}", f"{t.between_nodes_bytes / 1e6:.2f}")
            table.add_row(*row, *times, " ".join(marks))
        table.add_section()
    print(topology)
    Console().print(table)
    errors = [abs(t.predicted_s / t.measured_s - 1) for t in timings]
    result = {
        "median_regret": statistics.median(regrets),
        "largest_regret": max(regrets),
        "median_prediction_error": statistics.median(errors),
        "probe_s": probe_s,
    }
    print(
        f"regret of the chosen way: median {result['median_regret']:.1%}, largest {result['largest_regret']:.1%}; "
        f"predictions are off by {result['median_prediction_error']:.0%} (median); probe {probe_s:.1f} s"
    )
    if config.save_cost_file:
        model.save(Path(config.save_cost_file))
    if config.json:
        Path(config.json).parent.mkdir(parents=True, exist_ok=True)
        content = {"topology": repr(topology), "model": asdict(model), "regrets": regrets, **result}
        Path(config.json).write_text(json.dumps({**content, "timings": [asdict(t) for t in timings]}, indent=1) + "\n")
    return result
