"""python scripts/bench/plot_dispatch.py RESULT.json --to docs/pictures/dispatch.svg

Draws what `dispatch.py --json` wrote: time against size and against skew, with the link's limit, and prints the same
as markdown tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

matplotlib.use("svg")

# Ours in one hue, the others in greys and browns: the eye shall tell the two apart before it reads a name.
COLOURS = {
    "copy per expert": "#8c6d46",
    "gather-leader-scatter": "#c9a66b",
    "padded": "#6b6b6b",
    "padded, two-level": "#a8a8a8",
    "flat, 1 chunk": "#a9cce3",
    "hierarchical, 1 chunk": "#5499c7",
    "dedup, 1 chunk": "#1f618d",
    "dedup, 8 chunks": "#0b2f4a",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the results of dispatch.py.")
    parser.add_argument("result", type=Path, help="what dispatch.py --json wrote")
    parser.add_argument("--to", type=Path, required=True, metavar="SVG")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    draw(result, args.to)
    print(markdown(result))


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel for each K with several sizes, one for each (K, size) with several skews."""
    panels = size_panels(result["cases"]) + skew_panels(result["cases"])
    if not panels:
        raise SystemExit("nothing to draw: no two cases differ in size or in skew alone")
    plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.7 * len(panels), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (title, key, cases) in zip(axes[0], panels, strict=True):
        draw_panel(axis, title, key, cases)
    axes[0, 0].set_ylabel("seconds, forward and backward")
    lines, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})  # the same results give the same file


def draw_panel(axis: plt.Axes, title: str, key: str, cases: list[dict[str, Any]]) -> None:
    x = [case[key] for case in cases]
    for name, colour in COLOURS.items():
        seconds = [row["forward_backward_s"] for row in rows_of(cases, name)]
        axis.plot(x, seconds, "o-", ms=3, lw=1.3, color=colour, label=name)
    if cases[0]["link_limit_s"]:
        axis.plot(x, [2 * case["link_limit_s"] for case in cases], "--", color="#c0392b", lw=1.2, label="link limit")
    axis.set(title=title, yscale="log", xlabel={"tokens": "tokens per rank", "skew": "hottest expert ÷ mean"}[key])
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [f"{value:g}" for value in x])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.grid(alpha=0.25, lw=0.6)


def size_panels(cases: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    panels = []
    for k in sorted({case["k"] for case in cases}):
        chosen = sorted((c for c in cases if c["k"] == k and c["skew"] == 1), key=lambda c: c["tokens"])
        if len(chosen) > 1:
            panels.append((f"size, K = {k}", "tokens", chosen))
    return panels


def skew_panels(cases: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    panels = []
    for k, tokens in sorted({(case["k"], case["tokens"]) for case in cases}):
        chosen = sorted((c for c in cases if (c["k"], c["tokens"]) == (k, tokens)), key=lambda c: c["skew"])
        if len(chosen) > 1:
            panels.append((f"skew, K = {k}, {tokens} tokens", "skew", chosen))
    return panels


def markdown(result: dict[str, Any]) -> str:
    """One table of times (forward / forward and backward, ms) and one of bytes and messages, then the layers."""
    cases = result["cases"]
    heads = [f"{c['tokens']} tokens, K={c['k']}" + (f", hot ×{c['skew']:g}" if c["skew"] != 1 else "") for c in cases]
    names = [row["name"] for row in cases[0]["variants"]]
    times = [
        [name, *(ms(row["forward_s"], row["forward_backward_s"]) for row in rows_of(cases, name))] for name in names
    ]
    times.append(["rounds", *(str(case["rounds"]) for case in cases)])
    if result["rate_bits_per_s"]:
        times.insert(0, ["link limit", *(ms(case["link_limit_s"], 2 * case["link_limit_s"]) for case in cases)])
    sent = [[name, *map(traffic, rows_of(cases, name))] for name in names]
    layers = result["layers"]
    layer_rows = [[row["name"], times_of(row)] for row in layers["variants"]]
    layer_rows += [[name, f"skipped: {reason}"] for name, reason in layers["skipped"].items()]
    layer_head = f"{layers['tokens']} tokens, K={layers['k']}, expert {result['dim']}×{layers['ffn_dim']}"
    return "\n\n".join(
        [
            pipe(["ms: forward / forward + backward", *heads], times),
            pipe(["MB between nodes (messages)", *heads], sent),
            pipe(["whole layer, gating and experts included: ms", layer_head], layer_rows),
        ]
    )


def rows_of(cases: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for case in cases for row in case["variants"] if row["name"] == name]


def times_of(row: dict[str, Any]) -> str:
    return ms(row["forward_s"], row["forward_backward_s"])


def ms(forward_s: float, both_s: float) -> str:
    return f"{forward_s * 1e3:,.0f} / {both_s * 1e3:,.0f}"


def traffic(row: dict[str, Any]) -> str:
    return f"{row['bytes_between_nodes'] / 1e6:,.1f} ({row['messages_between_nodes']:,})"


def pipe(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
