"""metrics.jsonl and summary.json: what a run measured, one JSON object a line, safe against a kill at any time."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from twohop.trainer.errors import DataError
from twohop.trainer.trackers import Tracker

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
Record = dict[str, Any]


class MetricsWriter:
    """Appends records to run_dir/metrics.jsonl and passes their numbers on to trackers. One process (rank 0) owns it.

    `resumed_step` is the step of the checkpoint that training continues from: records after it are cut, because
    those steps are taken again. Without it the file starts empty.
    """

    def __init__(self, run_dir: Path, trackers: Sequence[Tracker] = (), resumed_step: int | None = None) -> None:
        path = Path(run_dir) / METRICS_FILE
        kept = [] if resumed_step is None else [r for r in read_metrics(run_dir) if r["step"] <= resumed_step]
        _replace(path, "".join(_line(record) for record in kept))
        self._file = path.open("a")
        self._trackers = tuple(trackers)

    def log(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Append {"step", "kind", **values}; values may nest and hold tensors, and NaN and infinity become null."""
        record: Record = {"step": step, "kind": kind, **values}
        self._file.write(_line(record))
        self._file.flush()  # from here on the line belongs to the kernel and survives kill -9
        for tracker in self._trackers:
            tracker.log(step, scalars(record))

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Close the file and finish the trackers, which show `summary`. Only the first call has an effect."""
        if self._file.closed:
            return
        self._file.close()
        for tracker in self._trackers:
            tracker.finish(dict(summary or {}))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[Record]:
    """All records of a run, in the order written; a last line torn by a kill is left out.

    Raises:
        DataError: another line is damaged.
    """
    path = Path(run_dir) / METRICS_FILE
    lines = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # behind the last line break: nothing, or a torn line
        try:
            records.append(json.loads(line))
        except ValueError:
            raise DataError(f"{path}:{number}: not a JSON object; delete the line") from None
    return records


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Write run_dir/summary.json, whole or not at all, and return its path."""
    path = Path(run_dir) / SUMMARY_FILE
    _replace(path, json.dumps(_plain(summary), indent=2) + "\n")
    return path


def read_summary(run_dir: Path) -> Record:
    """The run's summary; empty while the run has not ended."""
    path = Path(run_dir) / SUMMARY_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def scalars(record: Record) -> dict[str, float]:
    """The numbers of a record under flat names such as "train/loss", for trackers that draw curves.

    An expert load becomes "…/max_load" and "…/min_load", in units of a balanced load: E · fraction.
    """
    return {f"{record['kind']}/{name}": number for name, number in _flatten(_plain(record)) if name != "step"}


def _flatten(values: Record) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if name == "traffic":
            for level, phases in value.items():
                for phase, (size, messages) in phases.items():
                    yield f"{name}/{level}/{phase}/bytes", size
                    yield f"{name}/{level}/{phase}/messages", messages
        elif name == "load":
            yield "max_load", len(value) * max(value)
            yield "min_load", len(value) * min(value)
        elif isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in _flatten(value))
        elif isinstance(value, (int, float)):
            yield name, value


def _line(record: Record) -> str:
    return json.dumps(_plain(record)) + "\n"


def _plain(value: Any) -> Any:
    """Plain JSON values; tensors and arrays become numbers and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
