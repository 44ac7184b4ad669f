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
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, MaxNLocator, PercentFormatter

Record = dict[str, Any]

INK, MUTED, GRID, PAPER = "#27303b", "#6d7885", "#e8ebef", "#ffffff"
BLUE, ORANGE, TEAL = "#3565a5", "#d9772b", "#4a9a8c"
# Of a step's time, in the order in which they are stacked.
_TIME_COLORS = {
    "data": "#c9b36b",
    "forward": "#9dc3da",
    "dispatch": BLUE,
    "experts": "#7a5c99",
    "combine": TEAL,
    "backward": "#5f87b8",
    "optimizer": "#8a93a0",
    "exposed communication": ORANGE,
    "other": "#d8dde3",
}
_TRAFFIC_COLORS = {"dispatch": BLUE, "combine": TEAL, "metadata": "#8a93a0", "counts": "#b9c0c9"}
_MAX_POINTS = 600  # of a curve: more cannot be seen
_MAX_BARS = 60
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
        axes = step_axes(figure, "loss (nats per target)")
        steps, losses = curve(train, "loss")
        axes.plot(steps, losses, color=BLUE, alpha=0.28, linewidth=1)
        axes.plot(steps, running_mean(losses), color=BLUE, linewidth=2, label="training")
        if valid:
            axes.plot(*curve(valid, "valid_loss"), color=ORANGE, marker="o", markersize=5, label="validation")
        axes.legend()

    return svg("loss", draw, height=3.4)


def speed_plot(train: Sequence[Record]) -> str:
    """Targets per second of all ranks together."""
    return _area_plot("speed", train, "targets_per_s", "targets per second", TEAL, EngFormatter(sep=" "))


def mfu_plot(train: Sequence[Record]) -> str:
    """The part of the accelerators' peak that the model needed."""
    return _area_plot("mfu", train, "mfu", "model FLOPs utilisation", BLUE, PercentFormatter(1.0))


def memory_plot(train: Sequence[Record]) -> str:
    """The peak so far of the rank that needs most."""
    return _area_plot("memory", train, "peak_memory", "peak memory of a rank", ORANGE, EngFormatter("B", sep=" "))


def phase_plot(train: Sequence[Record]) -> str:
    """A stacked bar for each step, or for the mean of some: seconds of each phase."""
    groups = np.array_split(np.arange(len(train)), min(len(train), _MAX_BARS))
    steps = np.array([np.mean([train[i]["step"] for i in group]) for group in groups])
    names = [*_TIME_COLORS, *dict.fromkeys(name for r in train for name in r["phase_s"] if name not in _TIME_COLORS)]

    def draw(figure: Figure) -> None:
        axes = step_axes(figure, "seconds of a step")
        bottom = np.zeros(len(groups))
        for name in names:
            height = np.array([np.mean([train[i]["phase_s"].get(name, 0.0) for i in group]) for group in groups])
            if height.any():
                color = _TIME_COLORS.get(name, MUTED)
                axes.bar(steps, height, len(train) / len(groups) * 0.9, bottom, color=color, label=name)
            bottom += height
        figure.legend(loc="outside upper left", ncols=5, fontsize=9)

    return svg("phases", draw, height=3.4)


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

    return svg("traffic", draw, height=1.6 + 0.62 * len(levels))


def format_bytes(size: float) -> str:
    """A size for people, in decimal units."""
    return EngFormatter(unit="B", places=1, sep=" ")(size)


def _area_plot(name: str, train: Sequence[Record], key: str, label: str, color: str, unit: Formatter) -> str:
    def draw(figure: Figure) -> None:
        axes = step_axes(figure, label)
        steps, values = curve(train, key)
        axes.fill_between(steps, values, color=color, alpha=0.14, linewidth=0)
        axes.plot(steps, values, color=color, linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(unit)

    return svg(name, draw, height=2.5)


def svg(name: str, draw: Callable[[Figure], None], height: float) -> str:
    """What `draw` draws on a figure, as an element of a page; `name` tells the pictures of a page apart."""
    # A fixed salt makes the ids inside the picture the same in every report and different between pictures.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), dpi=140, layout="constrained", facecolor=PAPER)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    picture = text.getvalue()
    # Ids such as axes_1 come back in every picture of the page; nothing refers to them.
    return re.sub(r'(<g) id="[\w.]+_\d+"', r"\1", picture[picture.index("<svg") :])


def step_axes(figure: Figure, label: str) -> Axes:
    """Axes for something over steps."""
    axes: Axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.01)
    axes.grid(axis="x", visible=False)
    return axes


def number(value: float | None) -> float:
    """JSON's null stands for NaN and infinity, which a curve shows as a gap."""
    return float("nan") if value is None else value


def curve(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a key, thinned."""
    steps = np.array([record["step"] for record in records])
    return thin(steps, np.array([number(record[key]) for record in records]))


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over neighbours, so that a long run has no more than _MAX_POINTS points."""
    starts = np.arange(0, len(steps), -(-len(steps) // _MAX_POINTS))
    sizes = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / sizes, np.add.reduceat(values, starts) / sizes


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about 5 % of the curve, over fewer points at its ends."""
    half = max(1, len(values) // 40)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _phase_order(phase: str) -> tuple[int, str]:
    names = [name for base in _TRAFFIC_COLORS for name in (base, f"{base} backward")]
    return (names.index(phase) if phase in names else len(names), phase)


def _phase_color(phase: str) -> tuple[float, ...]:
    """Backward is the paler twin of its forward phase."""
    base = np.array(to_rgb(_TRAFFIC_COLORS.get(phase.removesuffix(" backward"), "#c9b36b")))
    return tuple(base + (1 - base) * 0.45 if phase.endswith(" backward") else base)
