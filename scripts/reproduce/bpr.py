#!/usr/bin/env python3
"""Batch priority routing against routing in the order of tokens (Riquelme 2021, V-MoE), under less and less capacity.

    scripts/reproduce/bpr.py --json build/bpr.json --plot docs/pictures/bpr.svg
    scripts/reproduce/bpr.py model.moe.every=1

Trains `experiment=vmoe_digits` without priorities, once for each seed, and evaluates every model under a range of
capacity factors C: tokens fill the experts in their order, or by their largest or summed weight. Prints the accuracy on
the validation split. Published: by priority a model keeps its accuracy far below C = 1, where the order of tokens loses
it; from C = 1 on the two agree.
"""

import sys
from pathlib import Path

import matplotlib
from common import Trained, arguments, evaluate, open_study, spread, table, train, write_json
from matplotlib.figure import Figure

CAPACITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
PRIORITIES = {"none": "order of tokens", "max": "by largest weight", "sum": "by summed weights"}
COLOURS = {"none": "#8c6d46", "max": "#1f618d", "sum": "#5499c7"}
Curves = dict[str, list[list[float]]]  # priority -> for each capacity, the accuracy of each seed


def main() -> int:
    """Train, evaluate, and compare."""
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the curves there")
    with open_study(parser) as options:
        runs = train(options, "vmoe", "experiment=vmoe_digits")
        curves = {how: [accuracies(runs, how, factor) for factor in CAPACITIES] for how in PRIORITIES}
        dropless = [evaluate(run, "model.moe.eval_capacity_factor=null")["valid_accuracy"] for run in runs]
        print(markdown(curves, dropless))
        if options.plot:
            draw(curves, options.plot)
        write_json(options, runs, capacities=CAPACITIES, accuracies=curves, dropless=dropless)
    return 0


def accuracies(runs: list[Trained], priority: str, factor: float) -> list[float]:
    """Of each run's model, when experts take K·N·factor/E tokens and no fewer."""
    how = [f"model.moe.eval_capacity_factor={factor}", f"model.moe.batch_priority={priority}"]
    return [evaluate(run, *how, "model.moe.min_capacity=0")["valid_accuracy"] for run in runs]


def markdown(curves: Curves, dropless: list[float]) -> str:
    """A row for each capacity factor, in per cent; the last column is the gain of each seed."""
    rows = []
    for i, factor in enumerate(CAPACITIES):
        pairs = zip(curves["max"][i], curves["none"][i], strict=True)
        gains = ", ".join(f"{100 * (by_weight - in_order):+.1f}" for by_weight, in_order in pairs)
        rows.append([f"{factor:g}", *(percent(curve[i]) for curve in curves.values()), gains])
    rows.append(["no limit", *[percent(dropless)] * len(curves), ""])
    return table(["C", *PRIORITIES.values(), "largest weight against order, each seed"], rows)


def percent(accuracy: list[float]) -> str:
    return spread([100 * value for value in accuracy], digits=1)


def draw(curves: Curves, path: Path) -> None:
    """Means over seeds, and the range between the lowest and the highest of them."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "bpr", "font.size": 9}
    with matplotlib.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for how, curve in curves.items():
            per_cent = [[100 * value for value in seeds] for seeds in curve]
            means = [sum(seeds) / len(seeds) for seeds in per_cent]
            axes.plot(CAPACITIES, means, "o-", ms=3, lw=1.3, color=COLOURS[how], label=PRIORITIES[how])
            lows, highs = [min(seeds) for seeds in per_cent], [max(seeds) for seeds in per_cent]
            axes.fill_between(CAPACITIES, lows, highs, color=COLOURS[how], alpha=0.15, lw=0)
        axes.set(xlabel="capacity factor C at evaluation", ylabel="accuracy, %")
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(path, metadata={"Date": None})  # the same results give the same file


if __name__ == "__main__":
    sys.exit(main())
