"""python scripts/bench/moe_layer.py --peers

The whole MoE layer on the CPU, fp32, forward and backward, beside what other systems make of the same work: the same
tokens, weights, routing, threads and allocator. Every output and gradient is compared with a dense reference before
anything is timed. Its limit is the bare dense matmuls of the expert rows of each rank, timed right after the layer
with the same threads: two matrices for experts with GELU, three with SwiGLU.

    A  4,096 tokens, D 256, F 1,024, 16 experts, top-2
    B  2,048 tokens, D 512, F 2,048, 8 experts, top-1, capacity 1.25
    C  2,048 tokens, D 256, F 128, 64 experts, top-8
    S  A with skewed routing: the hottest expert has 3.9 times the mean
    L  A with 128 tokens

Tokens are those of one rank. The memory of a layer, with --memory, is the largest resident set of a process of its
own during one pass, beyond what weights and input take, with an allocator that gives back at once what is freed.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import in_turn, machine, slowest, write_json
from layers import Layer, Sizes, Weights, dense_layer, layer_with_shadow, our_layer, output_and_gradient
from peers import PEERS, Peer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from twohop.comm import Topology
from twohop.models.config import Activation
from twohop.trainer.launching.launch import ALLOCATOR

FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # the resident set is what is in use

TIE = 1e-5  # of two logits: how a layer rounds its router's products decides for one of them


class Shape(NamedTuple):
    """One column of the table."""

    tokens: int
    dim: int
    ffn_dim: int
    num_experts: int
    k: int
    capacity_factor: float | None = None
    skew: float = 1.0  # rows of the hottest expert / mean; 1: as the random router has it

    def sizes(self, activation: Activation) -> Sizes:
        return Sizes(self.dim, self.ffn_dim, self.num_experts, self.k, activation, self.capacity_factor)


SHAPES = {
    "A": Shape(4096, 256, 1024, 16, 2),
    "B": Shape(2048, 512, 2048, 8, 1, capacity_factor=1.25),
    "C": Shape(2048, 256, 128, 64, 8),
    "S": Shape(4096, 256, 1024, 16, 2, skew=3.9),
    "L": Shape(128, 256, 1024, 16, 2),
}
OURS = {
    "twohop": Peer(our_layer, Activation.gelu),
    "twohop, SwiGLU": Peer(our_layer, Activation.swiglu),
}
SHADOW = {"twohop, expert 0 everywhere": Peer(layer_with_shadow, Activation.gelu)}  # the one that S makes hot


class Job(NamedTuple):
    """What the ranks of one group do."""

    shapes: dict[str, Shape]
    layers: tuple[str, ...]
    rounds: int
    budget_s: float  # for each shape


def main() -> int:
    args = parse_arguments()
    console, names = Console(width=150), (*OURS, *(SHADOW if args.shadow else ()), *(PEERS if args.peers else ()))
    names = tuple(name for name in names if not args.only or any(part in name for part in args.only))
    results: list[dict[str, Any]] = []
    job = Job({name: SHAPES[name] for name in args.shapes}, names, args.rounds, args.budget)
    for ranks in args.ranks:
        for measured in in_processes(timings, job, ranks, ALLOCATOR):
            console.print(table(measured))
            results.append(measured)
    memory = {}
    for name in names if args.memory else ():
        memory[name] = in_processes(peak_bytes, Job({"A": SHAPES["A"]}, (name,), 1, 0), 1, FRUGAL)
    if memory:
        console.print(memory_table(memory))
    if args.json is not None:
        write_json(args.json, {"layers": results, "extra_bytes_A": memory})
    return 0


# -- processes ---------------------------------------------------------------------------------------------------------


def in_processes(work: Callable[[Topology, Job], Any], job: Job, ranks: int, environment: dict[str, str]) -> Any:
    """What `work` returns on rank 0 of a fresh group of processes that share this machine's cores."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    fresh = {"OMP_NUM_THREADS": str(threads), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    before = dict(os.environ)
    os.environ.update(environment | fresh | {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)})
    answers = mp.get_context("spawn").SimpleQueue()
    try:
        context = mp.spawn(one_process, (work, job, ranks, answers), nprocs=ranks, join=False)
        while not context.join(timeout=1):
            pass
        return answers.get()
    finally:
        os.environ.clear()
        os.environ.update(before)


def one_process(rank: int, work: Callable[[Topology, Job], Any], job: Job, ranks: int, answers: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    answer = work(Topology.discover(ranks, timeout_s=300), job)
    if rank == 0:
        answers.put(answer)
    dist.barrier()
    dist.destroy_process_group()


# -- data --------------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """A rank's tokens and the gradient of what the layer makes of them. The first column of x is 1."""

    x_ND: Tensor
    grad_ND: Tensor

    @classmethod
    def make(cls, shape: Shape, rank: int) -> "Data":
        generator = torch.Generator().manual_seed(rank)
        x_ND, grad_ND = (torch.randn(shape.tokens, shape.dim, generator=generator) for _ in range(2))
        x_ND[:, 0] = 1.0
        return cls(x_ND, grad_ND)


def skew_router(weights: Weights, shape: Shape, ranks: int) -> None:
    """Adds to expert 0's logits until it is chosen `skew` times as often as the mean; the same on all ranks."""
    x_ND = torch.cat([Data.make(shape, rank).x_ND for rank in range(ranks)])
    weights.router_ED.mul_(0.3)[:, 0] = 0.0  # close logits, as of a trained router: a smooth rise of the share
    low, high = 0.0, 20.0
    for _ in range(30):
        weights.router_ED[0, 0] = (low + high) / 2
        share = ((x_ND @ weights.router_ED.T).topk(shape.k).indices == 0).sum() / (len(x_ND) * shape.k)
        low, high = (low, (low + high) / 2) if share * shape.num_experts > shape.skew else ((low + high) / 2, high)


def rows_at(weights: Weights, shape: Shape, topology: Topology) -> int:
    """Expert rows of this rank."""
    local = shape.num_experts // topology.ep_size
    rows = 0
    for rank in range(topology.ep_size):
        chosen = (Data.make(shape, rank).x_ND @ weights.router_ED.T).topk(shape.k).indices
        rows += int((chosen // local == topology.ep_rank).sum())
    return rows


# -- measuring ---------------------------------------------------------------------------------------------------------


def timings(topology: Topology, job: Job) -> list[dict[str, Any]]:
    """Of each shape, medians of the seconds of each layer and of the bare matmuls after it. Collective."""
    return [time_shape(topology, job, name) for name in job.shapes]


def time_shape(topology: Topology, job: Job, name: str) -> dict[str, Any]:
    shape = job.shapes[name]
    data, measures, skipped = Data.make(shape, topology.rank), {}, {}
    for layer_name in job.layers:
        try:
            layer, activation = build(layer_name, topology, shape, data)
        except (ImportError, NotImplementedError) as error:
            skipped[layer_name] = str(error)
            continue
        rows = rows_at(weights_of(shape, activation, topology.ep_size), shape, topology)
        measures[layer_name] = partial(time_layer_and_floor, layer, data, Floor(rows, shape.sizes(activation)))
    in_turn(measures, 2)
    times = in_turn(measures, job.rounds, job.budget_s)
    setting = {"shape": name, "ranks": topology.world_size, "threads": torch.get_num_threads(), **shape._asdict()}
    summaries = [summary(layer, times[layer], shape.tokens * topology.world_size) for layer in measures]
    return {**setting, "layers": summaries, "skipped": skipped, "machine": machine()}


def weights_of(shape: Shape, activation: Activation, ranks: int) -> Weights:
    weights = Weights.make(shape.sizes(activation))
    if shape.skew > 1:
        skew_router(weights, shape, ranks)
    return weights


def build(name: str, topology: Topology, shape: Shape, data: Data) -> tuple[Layer, Activation]:
    """The layer, once it has been seen to give the reference's output and gradient. Collective."""
    peer = (OURS | SHADOW | PEERS)[name]
    sizes = shape.sizes(peer.activation)
    weights = weights_of(shape, peer.activation, topology.ep_size)
    layer = peer.build(topology, weights, sizes)
    renormalize = shape.k > 1 or peer.renormalizes_one
    expected = reference(shape, peer.activation, renormalize, topology.ep_size, topology.rank)
    clear_N = margin(weights, shape, data) > TIE
    for actual, wanted in zip(output_and_gradient(layer, *data), expected, strict=True):
        actual, wanted = actual[clear_N], wanted[clear_N]
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3, msg=lambda m: f"{name}: {m}")
    return layer, peer.activation


def margin(weights: Weights, shape: Shape, data: Data) -> Tensor:
    """[N]: by how much a token's last expert that is chosen is ahead of the first that is not."""
    best_NK = (data.x_ND @ weights.router_ED.T).topk(shape.k + 1).values
    return best_NK[:, -2] - best_NK[:, -1]


@cache
def reference(shape: Shape, activation: Activation, renormalize: bool, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    layer = dense_layer(weights_of(shape, activation, ranks), shape.sizes(activation), renormalize)
    return output_and_gradient(layer, *Data.make(shape, rank))


class Floor:
    """The matmuls of a rank's expert rows, forward and backward, as if they had one expert."""

    def __init__(self, rows: int, sizes: Sizes) -> None:
        up = 2 * sizes.ffn_dim if sizes.activation is Activation.swiglu else sizes.ffn_dim
        self.x_RD, self.grad_RD = torch.randn(rows, sizes.dim), torch.randn(rows, sizes.dim)
        self.h_RU, self.a_RF = torch.randn(rows, up), torch.randn(rows, sizes.ffn_dim)
        self.up_UD, self.down_DF = torch.randn(up, sizes.dim), torch.randn(sizes.dim, sizes.ffn_dim)

    def run(self) -> None:
        for rows, weight, grad in ((self.x_RD, self.up_UD, self.h_RU), (self.a_RF, self.down_DF, self.grad_RD)):
            rows @ weight.T
            grad @ weight
            grad.T @ rows


def time_layer_and_floor(layer: Layer, data: Data, floor: Floor) -> tuple[float, ...]:
    """Seconds of the layer, forward and backward, then of the floor; each of the slowest rank. Collective."""
    x_ND = data.x_ND.clone().requires_grad_()
    for parameter in layer.module.parameters():
        parameter.grad = None
    seconds = []
    for work in (lambda: layer(x_ND).backward(data.grad_ND), floor.run):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return slowest(*seconds)


def summary(name: str, times: list[tuple[float, ...]], tokens: int) -> dict[str, Any]:
    layer_s, floor_s = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(layer / floor for layer, floor in times)
    rate = {"tokens_per_s": tokens / layer_s, "rounds": len(times)}
    return {"name": name, "layer_s": layer_s, "floor_s": floor_s, "ratio": ratio, **rate}


def peak_bytes(topology: Topology, job: Job) -> int | str:
    """What a pass of the only layer takes beyond what stands anyway, its weights' gradients included."""
    (name,), (shape,) = job.layers, job.shapes.values()
    data = Data.make(shape, topology.rank)
    try:
        layer, _ = build(name, topology, shape, data)
    except (ImportError, NotImplementedError) as error:
        return str(error)

    def run() -> None:
        layer(data.x_ND.clone().requires_grad_()).backward(data.grad_ND)
        for parameter in layer.module.parameters():
            parameter.grad = None

    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# -- showing -----------------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> Table:
    title = f"{measured['shape']}: {measured['ranks']} ranks x {measured['threads']} threads"
    shown = Table("", "ms", "matmuls alone, ms", "ratio", "tokens/s", title=title, title_justify="left")
    for row in measured["layers"]:
        cells = [f"{row[key] * 1e3:,.1f}" for key in ("layer_s", "floor_s")]
        shown.add_row(row["name"], *cells, f"{row['ratio']:.2f}", f"{row['tokens_per_s']:,.0f}")
    for name, reason in measured["skipped"].items():
        shown.add_row(name, f"skipped: {reason}")
    return shown


def memory_table(memory: dict[str, int | str]) -> Table:
    shown = Table("", "MB", title="Extra memory of a pass, A, 1 rank", title_justify="left")
    for name, peak in memory.items():
        shown.add_row(name, f"{peak / 1e6:,.0f}" if isinstance(peak, int) else f"skipped: {peak}")
    return shown


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="measure other systems in turn with ours")
    parser.add_argument("--shadow", action="store_true", help="measure ours with a shadow of the hot expert as well")
    parser.add_argument("--memory", action="store_true", help="measure peak memory as well")
    parser.add_argument("--only", nargs="+", metavar="PART", help="only layers whose name has one of these parts")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES], metavar="SHAPE")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for each table, at most")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
