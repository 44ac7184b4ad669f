"""python scripts/bench/gpu.py --json gpu.json

The MoE layer on one GPU in bf16, forward and backward, beside the limits of that GPU: ours, transformers' grouped_mm
experts and a textbook layer in turn; spread and sum against a copy; how often the host waits. Every output and gradient
is compared with a reference before anything is timed. Takes less than 8 minutes.

    mixtral   16,384 tokens, D 4,096, F 14,336, 8 experts, top-2
    fine      16,384 tokens, D 2,048, F 1,024, 64 experts, top-8

All experts are SwiGLU. The share of a layer is the time of dense matmuls of the same rows and widths ÷ its own time;
that of a copy or sum is its rate of bytes that must be read and written ÷ the rate of a copy of 1 GiB.
With `--device cpu` everything is checked in small, through Triton's interpreter, and nothing is timed:

    TRITON_INTERPRET=1 python scripts/bench/gpu.py --device cpu --tokens 16 --shrink 32
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from common import write_json
from gpu_parts import Data, Layer, Moves, checked_layers
from layers import Sizes
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from twohop.comm.kernels import fused
from twohop.models.config import Activation, MoEConfig, RouterConfig
from twohop.models.experts import Experts
from twohop.models.routers import TokenInfo

SHAPES = {
    "mixtral": Sizes(4096, 14336, 8, 2, Activation.swiglu),
    "fine": Sizes(2048, 1024, 64, 8, Activation.swiglu),
}
TOKENS = 16384
LAYER_GOALS, MOVE_GOAL = {"mixtral": 0.70, "fine": 0.55}, 0.80  # shares, on an H200
# Names under which a profile shows that the host waits for the device.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
Work = Callable[[], object]


def main() -> int:
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here, and nothing is measured without one; see --help for --device cpu")
        return 1
    if not fused(torch.empty(0, device=args.device)):
        print("--device cpu runs the kernels in Triton's interpreter: set TRITON_INTERPRET=1")
        return 1
    console, timed = Console(width=120), args.device == "cuda"
    result: dict[str, Any] = {"tokens": args.tokens, "device": args.device, "torch": torch.__version__, "shapes": {}}
    if timed:
        result |= {"device": torch.cuda.get_device_name(), "copy_bytes_per_s": copy_rate()}
    for name, sizes in SHAPES.items():
        sizes = sizes._replace(dim=sizes.dim // args.shrink, ffn_dim=sizes.ffn_dim // args.shrink)
        data = Data.make(sizes, args.tokens, args.device)
        layers, skipped = checked_layers(data, sizes)
        moves = Moves(layers["twohop"], data)
        moves.check()
        console.print(f"{name}: {', '.join(layers)}, spread and sum give what their references give")
        for side, reason in skipped.items():
            console.print(f"{name}: {side} is skipped: {reason}")
        if timed:
            measured = measure(layers, moves, data, sizes, args, result["copy_bytes_per_s"])
            result["shapes"][name] = measured | {"skipped": skipped, **sizes._asdict()}
            console.print(table(name, measured))
        del layers, moves, data
    if timed:
        result["goals"] = goals(result["shapes"])
        for text, met in result["goals"].items():
            console.print(f"{'met   ' if met else 'MISSED'} {text}")
    if args.json is not None:
        write_json(args.json, result)
    return 0


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(
    layers: Mapping[str, Layer], moves: Moves, data: Data, sizes: Sizes, args: argparse.Namespace, copy: float
) -> dict[str, Any]:
    """Times, shares and waits of one shape."""
    rows, tokens = len(moves.rows_RD), len(data.x_ND)
    operations = 6 * rows * (2 * sizes.ffn_dim * sizes.dim + sizes.dim * sizes.ffn_dim)
    works = {name: one_pass(layer, data) for name, layer in layers.items()}
    ours = layers["twohop"].module
    alone = {
        "dense matmuls": dense_matmuls(rows, sizes),
        "routing and plan": lambda: ours.plan(data.x_ND, TokenInfo(1)),
    }
    seconds = in_turn(alone | works, args.rounds)
    dense_s = seconds["dense matmuls"]
    of_layers = {
        name: {"seconds": seconds[name], "share": dense_s / seconds[name], "tokens_per_s": tokens / seconds[name]}
        for name in layers
    }
    both = moves.ours() | moves.torchs()
    of_moves = {}
    for name, s in in_turn({name: work for name, (work, _) in both.items()}, args.rounds).items():
        rate = both[name][1] / s
        of_moves[name] = {"seconds": s, "bytes_per_s": rate, "share": rate / copy}
    return {
        "dense_operations_per_s": operations / dense_s,
        "routing_and_plan_s": seconds["routing and plan"],
        "layers": of_layers,
        "moves": of_moves,
        "waits": waits_by_mode(layers["twohop"], data, sizes),
    }


def one_pass(layer: Layer, data: Data) -> Work:
    """Forward and backward."""
    x_ND = data.x_ND.clone().requires_grad_()

    def work() -> None:
        x_ND.grad = None
        for parameter in layer.module.parameters():
            parameter.grad = None
        layer(x_ND).backward(data.grad_ND)

    return work


def dense_matmuls(rows: int, sizes: Sizes) -> Work:
    """Those of the experts, forward and backward, as if there were one."""
    d, f = sizes.dim, sizes.ffn_dim
    shapes = (rows, d), (rows, 2 * f), (rows, f), (2 * f, d), (d, f)
    x_RD, h_RU, a_RF, up_UD, down_DF = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)

    def work() -> None:
        for rows_RI, weight_OI, grad_RO in ((x_RD, up_UD, h_RU), (a_RF, down_DF, x_RD)):
            rows_RI @ weight_OI.T
            grad_RO @ weight_OI
            grad_RO.T @ rows_RI

    return work


def copy_rate() -> float:
    """Bytes read and written in a second by a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_turn({"copy": lambda: target.copy_(source)}, 20)["copy"]


def in_turn(works: Mapping[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each over `rounds` rounds, in each of which every one has its turn, after two more."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 2):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return {name: statistics.median(spans[2:]) for name, spans in times.items()}


def seconds_of(work: Work) -> float:
    """On the device's clock, from an idle device: what the host takes before the first kernel counts as well."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def waits_by_mode(layer: Layer, data: Data, sizes: Sizes) -> dict[str, list[str]]:
    """How the host waits in one pass: dropless, with a capacity, and with counts on the host, as among ranks."""
    work, module = one_pass(layer, data), layer.module
    before = module.capacity.config
    waits = {"dropless": host_waits(work)}
    module.capacity.config = MoEConfig(router=RouterConfig(top_k=sizes.k), capacity_factor=1.0)
    waits["capacity"] = host_waits(work)
    module.capacity.config = before
    Experts.counts_on_device = False
    waits["dropless, counts on the host"] = host_waits(work)
    Experts.counts_on_device = True
    return waits


def host_waits(work: Work) -> list[str]:
    """The calls by which the host waits for the device in `work`, which has run before."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, record_function("counted"):
        work()
    return waits_inside(profiler.events(), "counted")


def waits_inside(events: Any, name: str) -> list[str]:
    """Names of the waits that begin inside the range `name`: the profiler waits by itself when it ends."""
    (span,) = (event.time_range for event in events if event.name == name)
    return [e.name for e in events if e.name in WAITS and span.start <= e.time_range.start <= span.end]


# -- showing -----------------------------------------------------------------------------------------------------------


def goals(shapes: Mapping[str, Any]) -> dict[str, bool]:
    """Each goal in words, and whether it is met."""
    met = {}
    for name, measured in shapes.items():
        share = {side: row["share"] for side, row in measured["layers"].items()}
        moves = {move: measured["moves"][move]["share"] for move in ("spread", "weighted sum")}
        met[f"{name}: {share['twohop']:.0%} of the dense matmul rate, goal {LAYER_GOALS[name]:.0%}"] = (
            share["twohop"] >= LAYER_GOALS[name]
        )
        for peer in ("transformers, grouped_mm", "textbook"):
            if peer in share:
                ratio = share["twohop"] / share[peer]
                met[f"{name}: {ratio:.2f} times as fast as {peer}, goal 1"] = ratio > 1
        for move, rate in moves.items():
            met[f"{name}: {move} at {rate:.0%} of the copy rate, goal {MOVE_GOAL:.0%}"] = rate >= MOVE_GOAL
        for mode, most in (("capacity", 0), ("dropless", 1), ("dropless, counts on the host", 1)):
            count = len(measured["waits"][mode])
            met[f"{name}: {mode}: the host waits {count} times, goal {most}"] = count <= most
    return met


def table(name: str, measured: Mapping[str, Any]) -> Table:
    shown = Table("", "ms", "share", "tokens/s or GB/s", title=name, title_justify="left")
    for side, row in measured["layers"].items():
        shown.add_row(side, f"{row['seconds'] * 1e3:,.2f}", f"{row['share']:.2f}", f"{row['tokens_per_s']:,.0f}")
    for move, row in measured["moves"].items():
        shown.add_row(move, f"{row['seconds'] * 1e3:,.3f}", f"{row['share']:.2f}", f"{row['bytes_per_s'] / 1e9:,.0f}")
    return shown


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: check, time nothing")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide D and F by this")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
