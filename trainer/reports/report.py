"""report.html: one self-contained page about one run, without scripts, network or external files."""

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from twohop.trainer.errors import DataError
from twohop.trainer.monitoring.metrics import METRICS_FILE, Record, read_metrics, read_summary
from twohop.trainer.reports import layer_plots, plots
from twohop.trainer.reports.page import PAGE, STYLE

REPORT_FILE = "report.html"
_CONFIG_FILE = "config.yaml"


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from metrics.jsonl, summary.json and config.yaml, and return its path.

    Raises:
        DataError: the folder holds no training record.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir)
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "eval"]
    if not train:
        raise DataError(f"{run_dir / METRICS_FILE}: no training step to report; is this the folder of a run?")
    sections = [
        _tiles(train, valid),
        _loss_section(train, valid),
        _speed_section(train),
        *_phase_section([record for record in train if record.get("phase_s")]),
        *_memory_section([record for record in train if record.get("peak_memory")]),
        *_moe_sections([record for record in train if record.get("moe")]),
        *_traffic_section([record for record in train if record.get("traffic")]),
        *_table_section("Summary", "What summary.json says at the end of the run.", {"": read_summary(run_dir)}),
        *_table_section("Configuration", "Everything that decided this run.", _config(run_dir)),
    ]
    name = escape(run_dir.resolve().name)
    subtitle = escape(str(run_dir.resolve().parent.name))
    path = run_dir / REPORT_FILE
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(PAGE.format(name=name, subtitle=subtitle, style=STYLE, body="\n".join(sections)))
    os.replace(unfinished, path)
    return path


def _tiles(train: Sequence[Record], valid: Sequence[Record]) -> str:
    tiles = [("steps", f"{train[-1]['step']:,}"), ("training loss", _number(train[-1]["loss"]))]
    if valid:
        tiles += [
            ("validation loss", _number(valid[-1]["valid_loss"])),
            ("perplexity", _number(valid[-1]["valid_perplexity"])),
            ("accuracy", f"{valid[-1]['valid_accuracy']:.1%}"),
        ]
    tiles.append(("targets/s, median", f"{_median(train, 'targets_per_s'):,.0f}"))
    cells = "".join(f"<div class=tile><b>{value}</b><span>{label}</span></div>" for label, value in tiles)
    return f"<div class=tiles>{cells}</div>"


def _loss_section(train: Sequence[Record], valid: Sequence[Record]) -> str:
    caption = (
        f"Cross-entropy of the targets. The training loss went from {_number(train[0]['loss'])} at step "
        f"{train[0]['step']} to {_number(train[-1]['loss'])} at step {train[-1]['step']} (thin: every step, bold: "
        "running mean)."
    )
    if valid:
        last = valid[-1]
        caption += f" On data that is never trained on (points) it ends at {_number(last['valid_loss'])}."
    return _figure("Loss", plots.loss_plot(train, valid), caption)


def _speed_section(train: Sequence[Record]) -> str:
    seconds = _median(train, "step_s")
    caption = f"Targets trained on per second, all ranks together; a step takes {seconds:.3g} s in the median."
    picture, measured = plots.speed_plot(train), [record for record in train if record.get("mfu") is not None]
    if measured:
        picture += plots.mfu_plot(measured)
        caption += f" The model needs {_median(measured, 'mfu'):.1%} of the accelerators' peak in the median."
    return _figure("Throughput", picture, caption)


def _phase_section(train: Sequence[Record]) -> Iterator[str]:
    """Where the time of a step goes: the mean of the ranks, and how far the slowest one is from it."""
    if not train:
        return
    mean, longest = (
        {name: _mean([r[key].get(name, 0.0) for r in train]) for name in train[-1][key]}
        for key in ("phase_s", "phase_max_s")
    )
    whole, exposed = sum(mean.values()), mean.get("exposed communication", 0.0)
    caption = (
        f"Seconds of a step by phase, in the mean of the ranks. In the whole run {exposed / whole:.1%} is "
        "exposed communication: a rank waits in an exchange, and nothing runs beside it. What a rank computes between "
        "exchanges counts as dispatch and combine; on the way back, as backward."
    )
    rows = "".join(
        f"<tr><td>{escape(name)}<td class=n>{seconds:.4g}<td class=n>{seconds / whole:.1%}"
        f"<td class=n>{longest[name]:.4g}"
        for name, seconds in sorted(mean.items(), key=lambda pair: -pair[1])
    )
    table = f"<table><tr><th>phase<th class=n>s, mean<th class=n>part<th class=n>s, slowest rank{rows}</table>"
    more = f"<details><summary>All numbers</summary>{table}</details>"
    yield _figure("Time of a step", plots.phase_plot(train), caption, more)


def _memory_section(train: Sequence[Record]) -> Iterator[str]:
    if train:
        peak = plots.format_bytes(train[-1]["peak_memory"])
        caption = (
            f"The most memory that any rank has needed up to a step, {peak} at the end: allocated by PyTorch on a GPU, "
            "resident in the process on the CPU."
        )
        yield _figure("Memory", plots.memory_plot(train), caption)


def _moe_sections(moe: Sequence[Record]) -> Iterator[str]:
    if not moe:
        return
    loads = {
        layer: [len(stats["load"]) * fraction for fraction in stats["load"]] for layer, stats in moe[-1]["moe"].items()
    }
    busiest = max(loads, key=lambda layer: max(loads[layer]))
    caption = (
        "Each expert's share of its layer's assignments; 1× is a perfectly balanced layer, red is busier, blue is "
        f"idler. At the last step the busiest expert takes {max(loads[busiest]):.2g}× its share "
        f"({escape(busiest)}), and the idlest of all layers {min(min(load) for load in loads.values()):.2g}×."
    )
    yield _figure("Expert load", layer_plots.load_plot(moe), caption)
    yield from _balance_section([record for record in moe if all(map(_has_balance, record["moe"].values()))])
    dropped = [_mean([record["moe"][layer]["dropped"] for layer in record["moe"]]) for record in moe]
    if not any(dropped):
        yield "<section><h2>Dropped tokens</h2><p>No assignment was dropped in the whole run.</p></section>"
        return
    caption = (
        f"Share of assignments beyond an expert's capacity (running mean). Averaged over layers, {_mean(dropped):.2%} "
        f"were dropped in the whole run and {dropped[-1]:.2%} at the last step; a token without any expert passes "
        "through the residual stream."
    )
    yield _figure("Dropped tokens", layer_plots.drop_plot(moe), caption)


def _has_balance(stats: Mapping[str, Any]) -> bool:
    return all(key in stats for key in layer_plots.BALANCE)


def _balance_section(moe: Sequence[Record]) -> Iterator[str]:
    if not moe:
        return
    last = moe[-1]["moe"].values()
    dead, experts = sum(stats["dead"] or 0 for stats in last), sum(len(stats["load"]) for stats in last)
    caption = (
        "Of each layer (running mean). Max violation: how far the busiest expert is above its share, 0 is balanced. "
        "Entropy of the load: 1 is balanced, 0 is one expert alone. Confidence: the largest weight that a token gives "
        f"to an expert, in the mean. At the last step {dead} of {experts} experts got no token."
    )
    yield _figure("Balance", layer_plots.balance_plot(moe), caption)


def _traffic_section(records: Sequence[Record]) -> Iterator[str]:
    """Bytes and messages by level and phase, averaged over steps."""
    if not records:
        return
    levels = {level: list(phases) for level, phases in records[-1]["traffic"].items()}
    mean = {
        level: {
            phase: [_mean([r["traffic"].get(level, {}).get(phase, (0, 0))[i] for r in records]) for i in (0, 1)]
            for phase in phases
        }
        for level, phases in levels.items()
    }
    sums = {level: [sum(pair[i] for pair in phases.values()) for i in (0, 1)] for level, phases in mean.items()}
    sent = ", ".join(
        f"{escape(level)} {plots.format_bytes(size)} in {messages:,.0f} messages"
        for level, (size, messages) in sums.items()
    )
    picture = plots.traffic_plot({level: {p: pair[0] for p, pair in phases.items()} for level, phases in mean.items()})
    rows = "".join(
        f"<tr><td>{escape(level)}<td>{escape(phase)}<td class=n>{plots.format_bytes(size)}<td class=n>{messages:,.0f}"
        for level, phases in mean.items()
        for phase, (size, messages) in phases.items()
    )
    table = f"<table><tr><th>hop<th>phase<th class=n>bytes per step<th class=n>messages per step{rows}</table>"
    caption = f"What expert dispatch sends in a mean step, by hop and by purpose: {sent}."
    yield _figure("Bytes per hop", picture, caption, f"<details><summary>All numbers</summary>{table}</details>")


def _table_section(title: str, caption: str, groups: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A small table for each group that is not empty."""
    tables = []
    for group, values in groups.items():
        rows = "".join(
            f"<tr><td>{escape(key)}<td class=v>{escape(_text(value))}" for key, value in _flatten(dict(values))
        )
        if rows:
            heading = f"<h3>{escape(group)}</h3>" if group else ""
            tables.append(f"<div class=card>{heading}<table>{rows}</table></div>")
    if tables:
        yield f"<section><h2>{title}</h2><p>{caption}</p><div class=cards>{''.join(tables)}</div></section>"


def _config(run_dir: Path) -> dict[str, dict[str, Any]]:
    """config.yaml by group; values that stand in no group come first."""
    path = run_dir / _CONFIG_FILE
    tree: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return {
        "run": {**{k: v for k, v in tree.items() if not isinstance(v, dict)}, **tree.pop("run", {})},
        **{k: v for k, v in tree.items() if isinstance(v, dict)},
    }


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _figure(title: str, svg: str, caption: str, more: str = "") -> str:
    picture = f'<figure role="img" aria-label="{title}">{svg}</figure>'
    return f"<section><h2>{title}</h2>{picture}<p>{caption}</p>{more}</section>"


def _text(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 100_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(records: Sequence[Record], key: str) -> float:
    return median(record[key] for record in records)
