"""sudo scripts/netlab --nodes 2 --ranks-per-node 4 --rate 200mbit -- python scripts/bench/dispatch.py --rate 200mbit

How long tokens take to their experts and home, forward and backward: other systems' ways (see `rivals`) and ours, in
turn, on the same data, every run checked against a dense reference. Then a whole MoE layer against DeepSpeed's own.
Also runs under torchrun, with --ranks-per-node to emulate nodes. Collective; rank 0 prints and writes.
"""

import argparse
import logging
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
    Forward,
    bytes_leaving_node,
    dense_reference,
    in_turn,
    join_cluster,
    machine,
    medians,
    rate_argument,
    scales,
    time_once,
    write_json,
)
from layers import Sizes, Weights, by_tokens, deepspeed_layer, dense_layer, our_layer, output_and_gradient
from rich.console import Console
from rich.table import Table
from rivals import Rivals

from twohop.comm import Topology, TrafficMeter, build_dispatcher

CASES = ["128:2", "512:2", "2048:2", "128:8", "512:8", "512:2:4", "128:8:2", "128:8:4"]
WARM_UP = Case(tokens=16, k=2)
OURS = [(name, chunks) for name in ("flat", "hierarchical", "dedup") for chunks in (1, 8)]
LAYER_CASE, LAYER_FFN_DIM = Case(tokens=512, k=8), 256


def main() -> None:
    args = parse_arguments()
    logging.disable(logging.WARNING)
    topology = join_cluster(args.ranks_per_node)
    console = Console(quiet=topology.rank != 0, width=110)
    result: dict[str, Any] = {
        "machine": machine(),
        "nodes": topology.num_nodes,
        "ranks_per_node": topology.ranks_per_node,
        "rate_bits_per_s": args.rate,
        "dim": DIM,
        "num_experts": NUM_EXPERTS,
        "cases": [],
    }
    measure_case(WARM_UP, topology, args)  # opens all connections
    for case in args.cases:
        measured = measure_case(case, topology, args)
        result["cases"].append(measured)
        console.print(table(f"{case.tokens} tokens per rank, K={case.k}, hottest expert {case.skew:g} x", measured))
    result["layers"] = measure_layers(topology, args)
    console.print(table("A whole MoE layer with gating and experts", result["layers"]))
    result["load_average_after"] = machine()["load_average"]
    if args.json and topology.rank == 0:
        write_json(args.json, result)
    dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ways to dispatch tokens to experts.")
    parser.add_argument(
        "--cases",
        type=Case.parse,
        nargs="*",
        default=[Case.parse(text) for text in CASES],
        metavar="TOKENS:K[:SKEW]",
        help="SKEW: share of the hottest expert ÷ mean share",
    )
    parser.add_argument("--rate", type=rate_argument, help="of the links, e.g. 200mbit: prints times ÷ link limit")
    parser.add_argument("--ranks-per-node", type=int, help="emulates nodes on one host")
    parser.add_argument("--rounds", type=int, default=5, help="at most; times are medians (default: 5)")
    parser.add_argument(
        "--budget", type=float, default=25, metavar="SECONDS", help="for the rounds of a case; one is always made"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist")
    return args


def measure_case(case: Case, topology: Topology, args: argparse.Namespace) -> dict[str, Any]:
    meter = TrafficMeter()
    data = Data.make(case, topology.rank)
    forwards = Rivals(topology, meter, scales()).forwards()
    for name, chunks in OURS:
        forwards[f"{name}, {chunks} chunk{'s' * (chunks > 1)}"] = our_forward(name, chunks, topology, meter)

    expected, traffic = dense_reference(data), {}

    def measure(name: str) -> tuple[float, ...]:
        meter.reset()
        seconds = time_once(forwards[name], data, expected)
        traffic[name] = between_nodes(meter)
        return seconds

    times = in_turn({name: partial(measure, name) for name in forwards}, args.rounds, args.budget)
    limit_s = bytes_leaving_node(case, topology) * 8 / args.rate if args.rate else None
    return {
        "tokens": case.tokens,
        "k": case.k,
        "skew": case.skew,
        "link_limit_s": limit_s,
        "rounds": rounds_of(times),
        "variants": [variant(name, medians(times[name]), traffic[name]) for name in forwards],
    }


def our_forward(name: str, chunks: int, topology: Topology, meter: TrafficMeter) -> Forward:
    dispatcher = build_dispatcher(name, topology, NUM_EXPERTS, chunks=chunks, meter=meter)
    local = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts)
    scale_ED = scales()[local]

    def experts(rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return rows * scale_ED.repeat_interleave(torch.tensor(counts), dim=0)

    return lambda x_ND, ids_NK, weights_NK: dispatcher.run(x_ND, ids_NK, weights_NK, experts)[0]


def measure_layers(topology: Topology, args: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's MoE layer against ours; a layer that cannot run is named with the reason."""
    case, data = LAYER_CASE, Data.make(LAYER_CASE, topology.rank)
    sizes = Sizes(DIM, LAYER_FFN_DIM, NUM_EXPERTS, case.k)
    weights = Weights.make(sizes)
    layers = {f"our layer, {name}": our_layer(topology, weights, sizes, name, 8) for name in ("flat", "dedup")}
    skipped = {}
    try:
        layers = {"deepspeed.moe.layer.MoE": deepspeed_layer(topology, weights, sizes)} | layers
    except ImportError as error:
        skipped["deepspeed.moe.layer.MoE"] = f"not installed here: {error}"
    expected = output_and_gradient(dense_layer(weights, sizes), data.x_ND, data.grad_ND)
    measures = {name: partial(time_once, by_tokens(layer), data, expected) for name, layer in layers.items()}
    in_turn(measures, 1)
    times = in_turn(measures, args.rounds, args.budget)
    return {
        "tokens": case.tokens,
        "k": case.k,
        "ffn_dim": LAYER_FFN_DIM,
        "rounds": rounds_of(times),
        "variants": [variant(name, medians(times[name])) for name in layers],
        "skipped": skipped,
    }


def rounds_of(times: dict[str, list[tuple[float, ...]]]) -> int:
    return max(len(rounds) for rounds in times.values())


def variant(name: str, seconds: tuple[float, ...], traffic: tuple[int, ...] = ()) -> dict[str, Any]:
    forward_s, forward_backward_s = seconds
    measured = {"name": name, "forward_s": forward_s, "forward_backward_s": forward_backward_s}
    return measured | dict(zip(("bytes_between_nodes", "messages_between_nodes"), traffic, strict=False))


def between_nodes(meter: TrafficMeter) -> tuple[int, ...]:
    """Bytes and messages of all ranks together. Collective."""
    sent = torch.tensor([meter.bytes_sent("between nodes"), meter.messages_sent("between nodes")])
    dist.all_reduce(sent)
    return tuple(sent.tolist())


def table(title: str, measured: dict[str, Any]) -> Table:
    limit_s = measured.get("link_limit_s")
    columns = ["forward ms", "forward + backward ms", "÷ link limit", "MB between nodes", "messages"]
    title += f" (medians of {measured['rounds']})"
    shown = Table("", *columns, title=title, title_justify="left")
    for row in measured["variants"]:
        times = [row["forward_s"], row["forward_backward_s"]]
        cells = [f"{seconds * 1e3:,.0f}" for seconds in times]
        cells += [" ".join(f"{t / (n * limit_s):.2f}" for n, t in enumerate(times, start=1)) if limit_s else ""]
        if "bytes_between_nodes" in row:
            cells += [f"{row['bytes_between_nodes'] / 1e6:,.1f}", f"{row['messages_between_nodes']:,}"]
        shown.add_row(row["name"], *cells)
    for name, reason in measured.get("skipped", {}).items():
        shown.add_row(name, f"skipped: {reason}")
    return shown


if __name__ == "__main__":
    main()
