"""The benchmark of starts: what it sees of a run, and what it makes of that."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import startup  # noqa: E402

# What a run leaves in its folder (argument 1), a moment after one another.
RUN = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
pause = lambda: time.sleep(0.03)
def record(kind, step, **values):
    pause()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "step": step, **values}) + chr(10))
folder.mkdir()
(folder / "config.yaml").touch()
for step in (1, 2, 3, 4):
    record("train", step, step_s=step / 1000)
    if step % 2 == 0:
        record("eval", step)
        pause()
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
for name in ("summary.json", "report.html"):
    pause()
    (folder / name).touch()
sys.exit(int(sys.argv[2]))
"""


def fake_run(folder: Path, code: int = 0) -> list[str]:
    return [sys.executable, "-c", RUN, str(folder), str(code)]


def test_parts_of_a_run_are_seen_from_outside(tmp_path: Path) -> None:
    parts = startup.watch_run(fake_run(tmp_path / "run"), tmp_path / "run")
    assert (parts["first step"], parts["later step"]) == (0.001, 0.003)
    timed = ("evaluation", "checkpoint", "sample", "report", "leaving")
    assert all(0 <= parts[name] < parts["whole run"] for name in timed)
    assert 0 < parts["configuration is composed and checked"] < parts["first step begins"] < parts["whole run"]


def test_a_run_that_fails_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with exit code 3"):
        startup.watch_run(fake_run(tmp_path / "run", 3), tmp_path / "run")
    with pytest.raises(SystemExit, match=r"ended with exit codes \[0, 3\]"):
        startup.seconds_of([["true"], [sys.executable, "-c", "raise SystemExit(3)"]])


def test_shares_are_those_of_the_whole_run() -> None:
    run = dict.fromkeys(("first step begins", "leaving", "sample", "report"), 2.0)
    run |= {"first step": 1.5, "later step": 0.5, "evaluation": 1.0, "checkpoint": 0.5}
    # 3 s to the second step's pace, 10 steps, 2 evaluations and checkpoints, sample, report, leaving.
    whole = 3 + 10 * 0.5 + 2 * 1.5 + 2 + 2 + 2
    expected = {"start": 3, "evaluation": 2, "checkpoint": 1, "sample": 2, "report": 2}
    found = startup.shares(run, steps=10, every=5)
    assert found == pytest.approx({name: seconds / whole for name, seconds in expected.items()})


def test_one_call_measures_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = startup._commands(3)
    assert {"twohop --help", "twohop train --help", "import torch, 3 at once", "an empty interpreter"} <= set(real)
    monkeypatch.setattr(startup, "_commands", lambda nproc: dict.fromkeys(real, lambda: startup.seconds_of([["true"]])))
    monkeypatch.setattr(startup, "_train", lambda options, run_dir, cache: fake_run(run_dir))
    target = tmp_path / "startup.json"
    result = startup.main(["--rounds", "2", "--nproc", "3", "--json", str(target)])
    written = json.loads(target.read_text())
    assert {key: written[key] for key in result} == result
    assert set(result["shares"]) == {"start", *startup.SHARES}
    out = capsys.readouterr().out
    for name in (*result["commands"], *result["run"], "a start beyond importing torch"):
        assert f"\n{name} " in f"\n{out}"


def test_a_run_is_the_quickstart_unless_told(tmp_path: Path) -> None:
    options = startup._options(["--steps", "7", "--every", "3", "model=dense"])
    command = startup._train(options, tmp_path / "run", tmp_path / "cache")
    assert {"train", "model=dense", "launch.nproc=4", "train.steps=7", "eval.every=3"} <= set(command)
    assert "experiment=quickstart" in startup._train(startup._options([]), tmp_path, tmp_path)
