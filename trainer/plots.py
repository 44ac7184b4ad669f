"""The pictures of a report: records of metrics.jsonl in, SVG out.

Drawn on bare figures, without pyplot, so that no window system and no global state is involved.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

Record = dict[str, Any]

INK, MUTED, GRID, PAPER = "#27303b", "#6d7885", "#e8ebef", "#ffffff"
BLUE, ORANGE, TEAL = "#3565a5", "#d9772b", "#4a9a8c"
_LOAD_COLORS = LinearSegmentedColormap.from_list("load", ["#2f6690", "#9dc3da", "#f7f7f4", "#f0b48a", "#b8482a"])
_PHASE_COLORS = {"dispatch": BLUE, "combine": TEAL, "metadata": "#8a93a0", "counts": "#b9c0c9"}
_MAX_POINTS = 600  # of a curve: more cannot be seen
_MAX_COLUMNS = 120  # of a heat map
_WIDTH = 8.6  # inches
_STYLE = {
    "svg.fonttype": "none",  # text stays text; the page gives it its font
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#c5ccd4",
    "axes.labelcolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def loss_plot(train: Sequence[Record], valid: Sequence[Record]) -> str:
    """Cross-entropy over steps: every step faint, its running mean bold, validation as points."""

    def draw(figure: Figure) -> None:
        axes = _step_axes(figure, "loss (nats per target)")
        steps, losses = _curve(train, "loss")
        axes.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=BLUE, linewidth=2, label="training")
        if valid:
            axes.plot(*_curve(valid, "valid_loss"), color=ORANGE, marker="o", markersize=5, label="validation")
        axes.legend()

    return _svg("loss", draw, height=3.4)


def speed_plot(train: Sequence[Record]) -> str:
    """Tokens per second of all ranks together."""

    def draw(figure: Figure) -> None:
        axes = _step_axes(figure, "targets per second")
        steps, speeds = _curve(train, "targets_per_s")
        axes.fill_between(steps, speeds, color=TEAL, alpha=0.14, linewidth=0)
        axes.plot(steps, speeds, color=TEAL, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))

    return _svg("speed", draw, height=2.5)


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

    return _svg("load", draw, height=sum(heights) + 0.4 * len(layers) + 0.8)


def drop_plot(moe: Sequence[Record]) -> str:
    """Share of the assignments that found no place under the capacity, a curve a layer."""

    def draw(figure: Figure) -> None:
        axes = _step_axes(figure, "dropped assignments")
        layers = list(moe[-1]["moe"])
        shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, len(layers)))
        for layer, color in zip(layers, shades, strict=True):
            named = len(layers) <= 8 or layer in (layers[0], layers[-1])
            steps = [record["step"] for record in moe]
            values = _running_mean(np.array([_number(record["moe"][layer]["dropped"]) for record in moe]))
            axes.plot(*_thin(np.array(steps), values), color=color, linewidth=1.7, label=layer if named else None)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend(ncols=min(len(layers), 4), loc="best", fontsize=9)

    return _svg("drops", draw, height=2.8)


def traffic_plot(mean_bytes: dict[str, dict[str, float]]) -> str:
    """A bar for each network level: bytes a step, stacked by phase; `mean_bytes` is {level: {phase: bytes}}."""
    levels = list(mean_bytes)
    phases = sorted({p for at in mean_bytes.values() for p in at}, key=_phase_order)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        start = np.zeros(len(levels))
        for phase in phases:
            width = np.array([mean_bytes[level].get(phase, 0.0) for level in levels])
            axes.barh(levels, width, left=start, height=0.56, color=_phase_color(phase), label=phase)
            start += width
        for row, total in enumerate(start):
            axes.annotate(f"{format_bytes(total)}", (total, row), (6, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, max(start.max() * 1.16, 1))
        axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=" "))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("bytes sent per step, all ranks together")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", labelcolor=INK)
        figure.legend(loc="outside upper left", ncols=4, fontsize=9)

    return _svg("traffic", draw, height=1.6 + 0.62 * len(levels))


def format_bytes(size: float) -> str:
    """A size for people, in decimal units."""
    return EngFormatter(unit="B", places=1, sep=" ")(size)


def _svg(name: str, draw: Callable[[Figure], None], height: float) -> str:
    # A fixed salt makes the ids inside the picture the same in every report and different between pictures.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), dpi=140, layout="constrained", facecolor=PAPER)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # Ids such as axes_1 come back in every picture of the page; nothing refers to them.
    return re.sub(r'(<g) id="[\w.]+_\d+"', r"\1", svg[svg.index("<svg") :])


def _step_axes(figure: Figure, label: str) -> Axes:
    axes: Axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    axes.grid(axis="x", visible=False)
    return axes


def _number(value: float | None) -> float:
    """JSON's null stands for NaN and infinity, which a curve shows as a gap."""
    return float("nan") if value is None else value


def _curve(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    steps = np.array([record["step"] for record in records])
    return _thin(steps, np.array([_number(record[key]) for record in records]))


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours, so that a long run has no more than _MAX_POINTS points."""
    starts = np.arange(0, len(steps), -(-len(steps) // _MAX_POINTS))
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about 5 % of the curve, over fewer points at its ends."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _load_map(moe: Sequence[Record], layer: str) -> np.ndarray:
    """Load [experts, columns]; 1 is a balanced share. Long runs are averaged into _MAX_COLUMNS columns."""
    loads = np.array([record["moe"][layer]["load"] for record in moe], dtype=float)  # [steps, experts]
    columns = np.array_split(loads, min(len(loads), _MAX_COLUMNS))
    return np.stack([column.mean(axis=0) for column in columns], axis=1) * loads.shape[1]


def _phase_order(phase: str) -> tuple[int, str]:
    names = [name for base in _PHASE_COLORS for name in (base, f"{base} backward")]
    return (names.index(phase) if phase in names else len(names), phase)


def _phase_color(phase: str) -> tuple[float, ...]:
    """Backward is the paler twin of its forward phase."""
    base = np.array(to_rgb(_PHASE_COLORS.get(phase.removesuffix(" backward"), "#c9b36b")))
    return tuple(base + (1 - base) * 0.45 if phase.endswith(" backward") else base)
