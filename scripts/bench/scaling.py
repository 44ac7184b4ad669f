#!/usr/bin/env python3
"""python scripts/bench/scaling.py --to docs/pictures/scaling.svg

Simulated times of every way to exchange tokens, against the number of ranks (`twohop.comm.simulate`): the bare
all-to-all of Tutel's measurements, flat and two-level, for three sizes; and a whole dispatch and combine of K = 8, with
counts and assignments. Prints markdown tables and the assumptions. Half a minute on one core.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from twohop.comm.cost import Workload
from twohop.comm.network import Link, Network
from twohop.comm.shipment import Shipment
from twohop.comm.simulate import simulate

matplotlib.use("svg")

LOCAL = 8  # ranks of a node
# 8 A100 on a node, each with a card of 200 Gbit/s, and NVLink. The cost of a message is the only number that is fitted
# to what was published (two-level loses below about 256 GPUs and is 4.25 times as fast at 2,048).
A100 = Network(
    between=Link(byte_s=8 / 200e9, send_s=3.2e-6, receive_s=3.2e-6, latency_s=5e-6),
    inside=Link(byte_s=1 / 300e9, send_s=1e-6, receive_s=1e-6, latency_s=2e-6),
    nics=8,
    copied_byte_s=1 / 1e12,
    exchange_s=10e-6,
)
RANKS = tuple(2**n for n in range(4, 15))
SIZES_MIB = (1, 32, 256)
TOKENS, TOP_K, DIM = 4096, 8, 4096
COLOURS = {"flat": "#c9743d", "hierarchical": "#5499c7", "dedup": "#0b2f4a"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate exchanges on up to 16,384 ranks.")
    parser.add_argument("--to", type=Path, metavar="SVG", help="draw the tables there")
    args = parser.parse_args()
    started = time.perf_counter()
    bare = {mib: {route: [bare_s(ranks, mib, route) for ranks in RANKS] for route in ("flat", "hierarchical")}
            for mib in SIZES_MIB}  # fmt: skip
    whole = {route: [whole_s(ranks, route) for ranks in RANKS] for route in COLOURS}
    print(tables(bare, whole))
    print(f"\nsimulated in {time.perf_counter() - started:.0f} s; {A100}")
    if args.to:
        draw(bare, whole, args.to)


def bare_s(ranks: int, mib: int, route: str) -> float:
    """Seconds of one all-to-all in which every rank sends so many MiB."""
    rows = 16384
    work = Workload(rows, 1, ranks, *[(mib << 20) / rows] * 3)
    shipment = Shipment.expected(work, (ranks // LOCAL, LOCAL), route)
    return simulate(shipment, A100, work, backward=False, agreement=False).forward_s / 2


def whole_s(ranks: int, route: str) -> float:
    """Seconds of a layer's dispatch and combine, forward and backward: 8 of max(256, ranks) experts, bf16 rows."""
    work = Workload(TOKENS, TOP_K, max(256, ranks), *[2.0 * DIM] * 3)
    result = simulate(Shipment.expected(work, (ranks // LOCAL, LOCAL), route), A100, work)
    return result.forward_s + result.backward_s


def tables(bare: dict[int, dict[str, list[float]]], whole: dict[str, list[float]]) -> str:
    """Markdown: the gain of two levels, then milliseconds of a layer."""
    heads = [f"{ranks:,}" for ranks in RANKS]
    lines = [f"| time of flat ÷ two-level | {' | '.join(heads)} |", "|---" * (len(RANKS) + 1) + "|"]
    for mib, times in bare.items():
        gains = [f / t for f, t in zip(times["flat"], times["hierarchical"], strict=True)]
        lines.append(f"| {mib} MiB | {' | '.join(f'{gain:.2f}' for gain in gains)} |")
    lines += ["", f"| ms of a layer | {' | '.join(heads)} |", "|---" * (len(RANKS) + 1) + "|"]
    lines += [f"| {route} | {' | '.join(f'{1e3 * s:.1f}' for s in seconds)} |" for route, seconds in whole.items()]
    return "\n".join(lines)


def draw(bare: dict[int, dict[str, list[float]]], whole: dict[str, list[float]], path: Path) -> None:
    """One panel for each size of the bare exchange, and one for the layer."""
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scaling", "font.size": 9})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    panels = {f"all-to-all, {mib} MiB a rank": times for mib, times in bare.items()}
    panels[f"MoE layer, {TOKENS:,} tokens a rank, K = {TOP_K}"] = whole
    figure, axes = plt.subplots(1, len(panels), figsize=(2.7 * len(panels), 3.2), layout="constrained")
    for axis, (title, times) in zip(axes, panels.items(), strict=True):
        for route, seconds in times.items():
            axis.plot(RANKS, [1e3 * s for s in seconds], "o-", ms=3, lw=1.3, color=COLOURS[route], label=route)
        axis.set(title=title, xscale="log", yscale="log", xlabel="ranks")
        axis.set_xticks([16, 256, 4096], ["16", "256", "4,096"])
        axis.minorticks_off()
        axis.grid(alpha=0.25, lw=0.6)
    axes[0].set_ylabel("milliseconds, simulated")
    lines, names = axes[-1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})  # the same results give the same file


if __name__ == "__main__":
    main()
