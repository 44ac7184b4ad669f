"""python scripts/bench/sweep.py --plot docs/pictures/layer.svg

How the time of our MoE layer, forward and backward, follows tokens, experts, experts per token, skew and ranks, beside
its limit, the bare dense matmuls of the same expert rows, measured in turn (see moe_layer.py). The CPU, fp32, GELU; all
numbers of tokens are those of one rank. Two ranks, except where ranks are counted.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from common import write_json
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from moe_layer import Job, Shape, in_processes, timings
from rich.console import Console
from rich.table import Table

from twohop.trainer.launching.launch import ALLOCATOR

BASE = Shape(tokens=1024, dim=256, ffn_dim=512, num_experts=16, k=2)
AXES: dict[str, tuple[float, ...]] = {
    "tokens": (64, 256, 1024, 4096),
    "num_experts": (4, 16, 64, 128),
    "k": (1, 2, 4, 8),
    "skew": (1, 2, 4, 6),
    "ranks": (1, 2, 4),
}
NAMES = {
    "tokens": "tokens of a rank",
    "num_experts": "experts",
    "k": "experts per token, K",
    "skew": "hottest expert ÷ mean",
    "ranks": "ranks",
}


def main() -> int:
    args = parse_arguments()
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    measured = measure(points, BASE._replace(tokens=args.tokens) if args.tokens else BASE, args.rounds)
    Console(width=110).print(table(measured))
    if args.json is not None:
        write_json(args.json, {"points": measured})
    if args.plot is not None:
        draw(measured, args.plot)
    return 0


def measure(points: list[tuple[str, float]], base: Shape, rounds: int) -> list[dict[str, Any]]:
    """Each point with its times, in the order given; all of a number of ranks in one group of processes."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for ranks in sorted({int(value) if axis == "ranks" else 2 for axis, value in points}):
        shapes = {
            f"{axis} {value}": base if axis == "ranks" else base._replace(**{axis: value})
            for axis, value in points
            if (value if axis == "ranks" else 2) == ranks
        }
        for row in in_processes(timings, Job(shapes, ("twohop",), rounds, 30.0), ranks, ALLOCATOR):
            axis, value = row["shape"].split()
            (layer,) = row["layers"]
            found[axis, float(value)] = {"axis": axis, "value": float(value), "threads": row["threads"], **layer}
    return [found[axis, float(value)] for axis, value in points]


def table(measured: list[dict[str, Any]]) -> Table:
    shown = Table("", "", "layer, ms", "limit, ms", "ratio", "tokens/s")
    for row in measured:
        cells = [f"{row['layer_s'] * 1e3:,.1f}", f"{row['floor_s'] * 1e3:,.1f}", f"{row['ratio']:.2f}"]
        shown.add_row(NAMES[row["axis"]], f"{row['value']:g}", *cells, f"{row['tokens_per_s']:,.0f}")
    return shown


def draw(measured: list[dict[str, Any]], path: Path) -> None:
    """One panel for each axis; the limit is drawn in."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 3).flat)
    for panel, axis in zip(panels, AXES, strict=False):
        rows = [row for row in measured if row["axis"] == axis]
        values = [row["value"] for row in rows]
        for key, colour, label in (("layer_s", "#1f618d", "MoE layer"), ("floor_s", "#8c6d46", "limit: matmuls alone")):
            panel.plot(values, [row[key] * 1e3 for row in rows], marker="o", color=colour, label=label)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [f"{value:g}" for value in values])
        panel.set_ylim(bottom=0)
        panel.set_xlabel(NAMES[axis])
        panel.set_ylabel("forward + backward, ms")
    panels[len(AXES)].axis("off")
    panels[len(AXES)].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "twohop"}):
        figure.savefig(path, metadata={"Date": None})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help=f"of the base of all axes but the first; default {BASE.tokens}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the times there")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
