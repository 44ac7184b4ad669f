#!/usr/bin/env python3
"""Batch priority routing against routing in the order of tokens (Riquelme 2021, V-MoE), under less and less capacity.

    scripts/reproduce/bpr.py --json build/bpr.json --plot docs/pictures/bpr.svg

Trains 120 steps of `experiment=vmoe_digits` without priorities, with experts in every block and in every second one,
and evaluates every model under a range of capacity factors C: tokens fill the experts in their order, or by their
largest or summed weight. Prints the accuracy on the validation split. Published: by priority a model keeps its accuracy
far below C = 1, where the order of tokens loses it; from C = 1 on the two agree.
"""

import sys
from pathlib import Path

import matplotlib
from common import Trained, arguments, evaluate, open_study, spread, table, train, write_json
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CAPACITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
SHORTER = ("experiment=vmoe_digits", "train.steps=120", "eval.every=0", "launch.nproc=1")
PRIORITIES = {"none": "order of tokens", "max": "by largest weight", "sum": "by summed weights"}
COLOURS = {"none": "#8c6d46", "max": "#1f618d", "sum": "#5499c7"}
PLACEMENTS = {1: "experts in every block", 2: "experts in every second block"}  # model.moe.every
Curves = dict[str, list[list[float]]]  # priority -> for each capacity, the accuracy of each seed in per cent


def main() -> int:
    """Train, evaluate, and compare."""
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the curves there")
    with open_study(parser) as options:
        runs = {
            every: train(options, f"every-{every}", *SHORTER, f"model.moe.every={every}")
            for every in PLACEMENTS
        }
        curves = {every: measure(trained) for every, trained in runs.items()}
        for every, curve in curves.items():
            dropless = [accuracy(run, "model.moe.eval_capacity_factor=null") for run in runs[every]]
            print(f"{PLACEMENTS[every]}; {spread(dropless, digits=1)} % without a limit\n\n{markdown(curve)}\n")
        if options.plot:
            draw(curves, options.plot)
        all_runs = [run for trained in runs.values() for run in trained]
        write_json(options, all_runs, capacities=CAPACITIES, accuracy_by_placement=curves)
    return 0


def measure(runs: list[Trained]) -> Curves:
    """Under every capacity factor, when tokens fill the experts in every order."""
    return {
        priority: [
            [
                accuracy(run, f"model.moe.eval_capacity_factor={factor}", f"model.moe.batch_priority={priority}")
                for run in runs
            ]
            for factor in CAPACITIES
        ]
        for priority in PRIORITIES
    }


def accuracy(run: Trained, *overrides: str) -> float:
    """In per cent; experts take K·N·C/E tokens and no fewer."""
    return 100 * evaluate(run, *overrides, "model.moe.min_capacity=0")["valid_accuracy"]


def markdown(curves: Curves) -> str:
    """A row for each capacity factor."""
    rows = [
        [f"{factor:g}", *(spread(curve[i], digits=1) for curve in curves.values())]
        for i, factor in enumerate(CAPACITIES)
    ]
    return table(["C", *(f"{name}, %" for name in PRIORITIES.values())], rows)


def draw(curves: dict[int, Curves], path: Path) -> None:
    """A panel for each placement."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "bpr", "font.size": 9}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.4, 3.2), layout="constrained")
        panels = figure.subplots(1, len(curves), sharey=True)
        for axes, (every, curve) in zip(panels, curves.items(), strict=True):
            draw_panel(axes, PLACEMENTS[every], curve)
        panels[0].set_ylabel("accuracy, %")
        panels[0].legend(frameon=False, loc="lower right")
        figure.savefig(path, metadata={"Date": None})  # the same results give the same file


def draw_panel(axes: Axes, title: str, curves: Curves) -> None:
    """Means over seeds, and the range between the lowest and the highest of them."""
    for priority, curve in curves.items():
        means = [sum(seeds) / len(seeds) for seeds in curve]
        axes.plot(CAPACITIES, means, "o-", ms=3, lw=1.3, color=COLOURS[priority], label=PRIORITIES[priority])
        lows, highs = map(min, curve), map(max, curve)
        axes.fill_between(CAPACITIES, list(lows), list(highs), color=COLOURS[priority], alpha=0.15, lw=0)
    axes.set(title=title, xlabel="capacity factor C at evaluation")
    axes.grid(alpha=0.25, lw=0.6)


if __name__ == "__main__":
    sys.exit(main())
