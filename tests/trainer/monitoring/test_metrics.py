"""metrics.jsonl, summary.json and the progress of a run."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console

from twohop.trainer.errors import DataError
from twohop.trainer.monitoring.metrics import MetricsWriter, read_metrics, read_summary, scalars, write_summary
from twohop.trainer.monitoring.progress import Progress


class Spy:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.summaries: list[dict[str, Any]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.logged.append((step, values))

    def finish(self, summary: dict[str, Any]) -> None:
        self.summaries.append(summary)


def test_a_record_is_one_line_of_plain_json_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    moe = {"blocks.1": {"load": torch.tensor([0.25, 0.75]), "dropped": np.float32(0.5)}}
    writer.log(
        1, {"loss": torch.tensor(2.5), "grad_norm": float("inf"), "moe": moe, "traffic": {"a": {"b": (3, np.int64(4))}}}
    )
    expected = {
        "step": 1,
        "kind": "train",
        "loss": 2.5,
        "grad_norm": None,
        "moe": {"blocks.1": {"load": [0.25, 0.75], "dropped": 0.5}},
        "traffic": {"a": {"b": [3, 4]}},
    }
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before the file is closed
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [expected]
    writer.log(1, {"valid_loss": 2.0}, kind="eval")
    assert read_metrics(tmp_path) == [expected, {"step": 1, "kind": "eval", "valid_loss": 2.0}]
    writer.close()


def test_resume_cuts_the_steps_that_are_taken_again(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 8):
            writer.log(step, {"loss": 8.0 - step})
        writer.log(5, {"valid_loss": 1.0}, kind="eval")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "tr')  # torn by a kill
    with MetricsWriter(tmp_path, resumed_step=5) as writer:
        writer.log(6, {"loss": 0.5})
    records = [(r["step"], r.get("loss", r.get("valid_loss"))) for r in read_metrics(tmp_path)]
    assert records == [(1, 7.0), (2, 6.0), (3, 5.0), (4, 4.0), (5, 3.0), (5, 1.0), (6, 0.5)]
    with MetricsWriter(tmp_path) as writer:  # a new run in the same folder
        writer.log(1, {"loss": 9.0})
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_every_logged_step_survives_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from twohop.trainer.monitoring.metrics import MetricsWriter\n"
        "writer = MetricsWriter(Path(sys.argv[1]))\n"
        "for step in range(1, 51): writer.log(step, {'loss': 1.0})\n"
        "print('logged', flush=True); time.sleep(60)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "logged\n"
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=10)
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 51))


def test_a_torn_last_line_is_left_out_and_another_is_an_error(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "x": "\xc3')
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    file.write_bytes(b'{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(tmp_path)


def test_summary_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_summary(tmp_path) == {}
    assert write_summary(tmp_path, {"valid_loss": torch.tensor(0.5), "bad": float("nan")}) == tmp_path / "summary.json"
    assert read_summary(tmp_path) == {"valid_loss": 0.5, "bad": None}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("the power is gone")))
    with pytest.raises(OSError, match="power is gone"):
        write_summary(tmp_path, {"valid_loss": 0.25})
    assert read_summary(tmp_path) == {"valid_loss": 0.5, "bad": None}


def test_trackers_get_flat_numbers(tmp_path: Path) -> None:
    spy = Spy()
    with MetricsWriter(tmp_path, [spy]) as writer:
        load = [0.5, 0.25, 0.125, 0.125]
        traffic = {"between nodes": {"dispatch": [1000, 3]}}
        writer.log(7, {"loss": 2.0, "moe": {"blocks.1": {"load": load, "dropped": 0.25}}, "traffic": traffic})
        writer.log(7, {"valid_loss": float("nan"), "valid_perplexity": 3.0}, kind="eval")
        writer.close({"valid_loss": 1.0})
    expected = {
        "train/loss": 2.0,
        "train/moe/blocks.1/max_load": 2.0,
        "train/moe/blocks.1/min_load": 0.5,
        "train/moe/blocks.1/dropped": 0.25,
        "train/traffic/between nodes/dispatch/bytes": 1000,
        "train/traffic/between nodes/dispatch/messages": 3,
    }
    assert spy.logged == [(7, expected), (7, {"eval/valid_perplexity": 3.0})]
    assert spy.summaries == [{"valid_loss": 1.0}]  # finished once, not again at the end of the block
    assert scalars({"step": 1, "kind": "eval"}) == {}


def test_trackers_are_finished_when_training_fails(tmp_path: Path) -> None:
    spy = Spy()
    with pytest.raises(ZeroDivisionError), MetricsWriter(tmp_path, [spy]):
        _ = 1 / 0
    assert spy.summaries == [{}]


def lines_of(total: int, terminal: bool, enabled: bool = True, first: int = 0) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, quiet=not enabled)
    with Progress(total, enabled, first, console) as progress:
        progress.print("model [bold] has", 12345, "parameters " + "x" * 200)
        for step in range(first + 1, total + 1):
            progress.update(step, 10 / step, 12345.6)
    return output.getvalue()


def test_plain_lines_when_the_output_is_no_terminal() -> None:
    first, *lines = lines_of(100, terminal=False).splitlines()
    assert first == "model [bold] has 12345 parameters " + "x" * 200
    assert len(lines) == 20
    assert lines[0].startswith("step 5/100  loss 2.0000  12,346 tokens/s  0:00 left")
    assert lines[-1].startswith("step 100/100  loss 0.1000")
    assert len(lines_of(3, terminal=False).splitlines()) == 4
    assert lines_of(103, terminal=False, first=90).splitlines()[-1].startswith("step 103/103")


def test_a_live_bar_on_a_terminal() -> None:
    shown = lines_of(100, terminal=True)
    assert "\x1b[" in shown  # it moves the cursor
    last = shown.rsplit("step", 1)[1]
    for part in ("100/100", "0.1000", "12,346 tokens/s", "left", "0:00:00"):
        assert part in last, shown
    assert "[bold] has 12345" in shown


def test_silent_when_not_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(10, terminal=True, enabled=False) == lines_of(10, terminal=False, enabled=False) == ""
    with Progress(2, enabled=False) as progress:
        progress.update(2, 1.0, 1.0)
        progress.print("nothing")
    assert capsys.readouterr() == ("", "")
