"""The pictures of MoE layers in a report: records of metrics.jsonl in, SVG out."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from twohop.trainer.reports.plots import INK, MUTED, Record, number, running_mean, step_axes, svg, thin

_LOAD_COLORS = LinearSegmentedColormap.from_list("load", ["#2f6690", "#9dc3da", "#f7f7f4", "#f0b48a", "#b8482a"])
_MAX_COLUMNS = 120  # of a heat map
# Of a layer, with what they say.
BALANCE = {"max_violation": "max violation", "entropy": "entropy", "confidence": "confidence"}


def load_plot(moe: Sequence[Record]) -> str:
    """One heat map a layer: each expert's share of the assignments, in units of a balanced share, over steps."""
    layers = list(moe[-1]["moe"])
    maps = {layer: _load_map(moe, layer) for layer in layers}  # [experts, columns]
    # Colours end at the 99.5th percentile: one outlier in the first steps would bleach all the rest.
    top = max(2.0, float(np.nanquantile(np.concatenate([m.ravel() for m in maps.values()]), 0.995)))
    tallest = 2.4 if len(layers) <= 6 else 1.3  # inches
    heights = [min(max(len(m) * 0.055 + 0.5, 1.0), tallest) for m in maps.values()]

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(layers), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        for axes, layer in zip(rows, layers, strict=True):
            experts = len(maps[layer])
            image = axes.imshow(
                maps[layer],
                aspect="auto",
                interpolation="nearest",
                cmap=_LOAD_COLORS,
                norm=TwoSlopeNorm(1.0, 0.0, top),
                extent=(moe[0]["step"], max(moe[-1]["step"], moe[0]["step"] + 1), experts - 0.5, -0.5),
            )
            axes.grid(False)
            axes.spines[:].set_visible(False)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.set_title(f"{layer}  ·  {experts} experts", loc="left", fontsize=10, color=INK)
        rows[-1].set_xlabel("step")
        figure.supylabel("expert", fontsize=10, color=MUTED)
        ticks = [0, 0.5, 1, *range(2, int(top) + 1, max(1, int(top) // 4))]
        place: dict[str, Any] = {"location": "top", "anchor": (1.0, 0.0), "shrink": 0.4, "aspect": 36, "pad": 0.01}
        bar = figure.colorbar(image, ax=rows, ticks=ticks, format=lambda x, _: f"{x:g}×", **place)
        bar.outline.set_visible(False)

    return svg("load", draw, height=sum(heights) + 0.4 * len(layers) + 0.8)


def drop_plot(moe: Sequence[Record]) -> str:
    """Share of the assignments that found no place under the capacity, a curve a layer."""

    def draw(figure: Figure) -> None:
        axes = step_axes(figure, "dropped assignments")
        _layer_curves(axes, moe, "dropped")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(ncols=min(len(moe[-1]["moe"]), 4), loc="best", fontsize=9)

    return svg("drops", draw, height=2.8)


def balance_plot(moe: Sequence[Record]) -> str:
    """Three panels with a curve a layer: max violation and entropy of its load, and the confidence of its router."""

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(BALANCE), 1, sharex=True)
        for axes, (key, label) in zip(rows, BALANCE.items(), strict=True):
            _layer_curves(axes, moe, key)
            axes.set_ylabel(label)
            axes.margins(x=0.01)
            axes.grid(axis="x", visible=False)
        rows[0].set_ylim(bottom=0)
        rows[-1].set_xlabel("step")
        rows[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
        handles, labels = rows[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4), fontsize=9)

    return svg("balance", draw, height=5.2)


def _layer_curves(axes: Axes, moe: Sequence[Record], key: str) -> None:
    """A curve a layer, its running mean; of many layers only the first and the last are named."""
    layers = list(moe[-1]["moe"])
    shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(layers)))
    steps = np.array([record["step"] for record in moe])
    for layer, color in zip(layers, shades, strict=True):
        named = len(layers) <= 8 or layer in (layers[0], layers[-1])
        values = running_mean(np.array([number(record["moe"][layer][key]) for record in moe]))
        axes.plot(*thin(steps, values), color=color, linewidth=1.7, label=layer if named else None)


def _load_map(moe: Sequence[Record], layer: str) -> np.ndarray:
    """Load [experts, columns]; 1 is a balanced share. Long runs are averaged into _MAX_COLUMNS columns."""
    loads = np.array([record["moe"][layer]["load"] for record in moe], dtype=float)  # [steps, experts]
    columns = np.array_split(loads, min(len(loads), _MAX_COLUMNS))
    return np.stack([column.mean(axis=0) for column in columns], axis=1) * loads.shape[1]
