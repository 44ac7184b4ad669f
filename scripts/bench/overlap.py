"""sudo scripts/netlab --nodes 2 --ranks-per-node 4 --rate 200mbit -- python scripts/bench/overlap.py --rate 200mbit

How much of the way is hidden by cutting tokens into chunks: dedup's time ÷ link limit of its bytes, for several numbers
of chunks; then with experts whose work is of the link's order: step ÷ the larger of the two alone,
and ÷ the larger of the two in the forward plus that in the backward pass. With `--experts cpu`
the same cores carry experts and communication, and no schedule hides one behind the other beyond the CPU time that
stands beside; `--experts elsewhere` takes the same time without a core, as experts on an accelerator do.
Everything is measured in turn, in one call. Collective; rank 0 prints and writes.
"""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import (
    DIM,
    NUM_EXPERTS,
    Case,
    Data,
    bytes_leaving_node,
    in_turn,
    join_cluster,
    machine,
    medians,
    rate_argument,
    slowest,
    time_once,
    write_json,
)
from rich.console import Console
from rich.table import Table

from twohop.comm import Dispatched, TokenDispatcher, build_dispatcher
from twohop.models.config import Activation
from twohop.models.experts import ExpertPass, Experts

CASE = Case(tokens=512, k=8)
TRIAL_FFN_DIM = 128


def main() -> None:
    args = parse_arguments()
    topology = join_cluster(args.ranks_per_node)
    console = Console(quiet=topology.rank != 0, width=110)
    data = Data.make(CASE, topology.rank)
    limit_s = bytes_leaving_node(CASE, topology) * 8 / args.rate
    dispatchers = {c: build_dispatcher("dedup", topology, NUM_EXPERTS, chunks=c) for c in args.chunks}

    arrived = dispatchers[args.chunks[0]].dispatch(data.x_ND, data.ids_NK, data.weights_NK)
    if args.experts == "cpu":
        ffn_dim = fitting_ffn_dim(arrived, 2 * limit_s * args.compute)
        experts: Callable = make_experts(len(arrived.counts), ffn_dim)
    else:
        ffn_dim, experts = None, partial(Elsewhere.apply, 2 / 3 * limit_s * args.compute / mean_rows(arrived))
    measures: dict[str, Callable[[], tuple[float, ...]]] = {"experts alone": partial(time_experts, arrived, experts)}
    for chunks, dispatcher in dispatchers.items():
        measures[f"dedup alone, {chunks}"] = partial(time_step, dispatcher, data, lambda rows, counts: rows)
        measures[f"with experts, {chunks}"] = partial(time_step, dispatcher, data, experts)
    measures = {name: partial(with_cpu, measure) for name, measure in measures.items()}
    in_turn(measures, 1)  # opens connections, touches memory
    seconds = {name: medians(times) for name, times in in_turn(measures, args.rounds).items()}

    result = {
        "machine": machine(),
        "load_average_after": machine()["load_average"],
        "rounds": args.rounds,
        "rate_bits_per_s": args.rate,
        "tokens": CASE.tokens,
        "k": CASE.k,
        "dim": DIM,
        "num_experts": NUM_EXPERTS,
        "experts": args.experts,
        "ffn_dim": ffn_dim,
        "compute": args.compute,
        "link_limit_s": limit_s,
        "seconds": seconds,
    }
    console.print(table(args.chunks, seconds, limit_s))
    if args.json and topology.rank == 0:
        write_json(args.json, result)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how well dispatch overlaps with itself and with experts.")
    parser.add_argument("--rate", type=rate_argument, required=True, help="of the links, e.g. 200mbit")
    parser.add_argument("--ranks-per-node", type=int, help="emulates nodes on one host")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument(
        "--compute", type=float, default=0.5, help="time of the experts ÷ link limit (cpu: CPU time ÷ cores)"
    )
    parser.add_argument("--experts", choices=("cpu", "elsewhere"), default="cpu", help="who multiplies")
    parser.add_argument("--rounds", type=int, default=7, help="times are medians (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


def with_cpu(measure: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """Its times, and the CPU seconds of all ranks ÷ cores: no step can be shorter. (Packets are the kernel's work and
    come on top.) Collective.
    """
    start = time.process_time()
    seconds = measure()
    spent = torch.tensor(time.process_time() - start, dtype=torch.float64)
    dist.all_reduce(spent)
    return *seconds, spent.item() / (os.cpu_count() or 1)


def time_step(dispatcher: TokenDispatcher, data: Data, experts: Callable) -> tuple[float, ...]:
    """Seconds of dispatch, experts and combine: forward, and forward and backward. Collective."""

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        if not isinstance(experts, Experts):
            return dispatcher.run(*inputs, experts)[0]
        one_pass = ExpertPass(experts, data.x_ND)  # as an MoE layer does it
        return dispatcher.run(*inputs, one_pass, one_pass.open)[0]

    return time_once(forward, data)


def time_experts(arrived: Dispatched, experts: Callable) -> tuple[float, ...]:
    """Seconds of the experts on the rows that they get, all ranks at once. Collective."""
    rows_RD = arrived.rows.detach().requires_grad_()
    grad_RD = torch.ones_like(rows_RD)
    dist.barrier()
    start = time.perf_counter()
    y_RD = experts(rows_RD, arrived.counts)
    after_forward = time.perf_counter()
    y_RD.backward(grad_RD)
    return slowest(after_forward - start, time.perf_counter() - start)


class Elsewhere(torch.autograd.Function):
    """Experts that let time pass in proportion to their rows, twice as much backward, and need no core for it."""

    @staticmethod
    def forward(ctx: Any, seconds_per_row: float, rows_RD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        ctx.seconds = seconds_per_row * len(rows_RD)
        time.sleep(ctx.seconds)
        return rows_RD.clone()

    @staticmethod
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return None, grad_RD.clone(), None


def mean_rows(arrived: Dispatched) -> float:
    """Rows that a rank's experts get, on average. Collective."""
    rows = torch.tensor(len(arrived.rows), dtype=torch.float64)
    dist.all_reduce(rows)
    return rows.item() / dist.get_world_size()


def make_experts(count: int, ffn_dim: int) -> Experts:
    experts = Experts(count, DIM, ffn_dim, Activation.gelu)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return experts


def fitting_ffn_dim(arrived: Dispatched, target_s: float) -> int:
    """Hidden width, a multiple of 16, with which all ranks' experts keep all cores busy for about `target_s`, forward
    and backward. By CPU time, which other work on the machine disturbs less. Collective.
    """
    trial = make_experts(len(arrived.counts), TRIAL_FFN_DIM)
    *_, cpu_s = medians([with_cpu(partial(time_experts, arrived, trial)) for _ in range(5)])
    return max(16, round(TRIAL_FFN_DIM * target_s / cpu_s / 16) * 16)


def table(chunks: list[int], seconds: dict[str, tuple[float, ...]], limit_s: float) -> Table:
    *alone, experts_cpu = seconds["experts alone"]
    title = f"link limit {ms([limit_s, 2 * limit_s])} ms; experts alone {ms(alone)} ms, CPU {ms([experts_cpu])} ms"
    shown = Table(title=title, caption="each: forward, then forward and backward", title_justify="left")
    for column in (
        "chunks",
        "dedup ms",
        "÷ link limit",
        "with experts ms",
        "÷ larger alone",
        "÷ pass by pass",
        "CPU ms",
    ):
        shown.add_column(column)
    for c in chunks:
        (*dedup, _), (*both, cpu) = seconds[f"dedup alone, {c}"], seconds[f"with experts, {c}"]
        ratios = [t / (n * limit_s) for n, t in enumerate(dedup, start=1)]
        step = [t / max(pair) for t, *pair in zip(both, dedup, alone, strict=True)]
        # Forward and backward cannot overlap: no schedule is faster than the larger of the two in each.
        bound_s = sum(max(pair) for pair in zip(passes(dedup), passes(alone), strict=True))
        shown.add_row(str(c), ms(dedup), two(ratios), ms(both), two(step), f"{both[1] / bound_s:.2f}", ms([cpu]))
    return shown


def passes(seconds: Sequence[float]) -> tuple[float, float]:
    """Forward, and backward alone, of the times of forward and of both."""
    return seconds[0], seconds[1] - seconds[0]


def ms(times: Sequence[float]) -> str:
    return " ".join(f"{t * 1e3:,.0f}" for t in times)


def two(ratios: list[float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
