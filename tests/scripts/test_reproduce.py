"""What the studies share: runs are trained once for each seed and kept, evaluated with overrides, told with spread."""

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.tiny import tiny_overrides, write_corpus
from twohop.trainer import cli
from twohop.trainer.errors import CheckpointError
from twohop.trainer.launching import workers

REPRODUCE = Path(__file__).parents[2] / "scripts" / "reproduce"


def load(name: str) -> ModuleType:
    """A study as a module; its `common` is the one beside it, not that of the benchmarks."""
    spec = importlib.util.spec_from_file_location(name, REPRODUCE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        if name != "common":
            patch.setitem(sys.modules, "common", common)
        patch.setitem(sys.modules, name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
    return module


common = load("common")


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run, in this process instead of one of their own."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        seen.append(command)
        assert cli.run(command[1:]) == 0

    monkeypatch.setattr(subprocess, "run", run)
    start = "twohop.trainer.commands.train.start"
    monkeypatch.setattr(start, lambda _, config, folder, nodes: workers.train(config, folder))
    return seen


def options(folder: Path, *overrides: str) -> Namespace:
    given = ["--seeds", "2", "--runs", str(folder), "--json", str(folder / "all" / "numbers.json"), *overrides]
    return common.arguments("A study.").parse_args(given)


def test_runs_are_trained_once_for_each_seed_and_evaluated_with_overrides(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    write_corpus(tmp_path)
    tiny = [text for text in tiny_overrides(tmp_path) if not text.startswith("run.dir")]
    given = options(tmp_path / "runs", "train.steps=2")
    runs = common.train(given, "variant", *tiny, "model.moe.eval_capacity_factor=2.0")
    assert [run.seed for run in runs] == [0, 1]
    assert [run.folder for run in runs] == [tmp_path / "runs" / "variant" / f"seed-{seed}" for seed in (0, 1)]
    assert runs[0].summary["steps"] == 2
    assert runs[0].summary["valid_loss"] != runs[1].summary["valid_loss"]

    same = common.evaluate(runs[1])
    assert same["valid_loss"] == runs[1].summary["valid_loss"]
    starved = common.evaluate(runs[1], "model.moe.eval_capacity_factor=0.1", "model.moe.min_capacity=0")
    assert starved["valid_loss"] != same["valid_loss"]
    with pytest.raises(CheckpointError, match=r"model\.moe\.router\.top_k"):
        common.evaluate(runs[1], "model.moe.router.top_k=1")

    again = common.train(given, "variant", *tiny, "model.moe.eval_capacity_factor=2.0")
    assert (again, len(commands)) == (runs, 2)  # what has ended is taken as it is

    with pytest.raises(SystemExit, match=r"variant/seed-0 was trained with other overrides; name another folder"):
        common.train(given, "variant", *tiny)
    common.write_json(given, runs, effect=[1, 2])
    written = json.loads((tmp_path / "runs" / "all" / "numbers.json").read_text())
    assert written["effect"] == [1, 2]
    assert [run["summary"] for run in written["runs"]] == [run.summary for run in runs]
    assert written["runs"][0]["name"] == "variant"
    assert written["machine"]["torch"]


def test_means_have_the_sample_deviation_as_spread() -> None:
    assert common.spread([1.0, 2.0, 3.0], digits=2) == "2.00 ± 1.00"
    assert common.spread([0.5]) == "0.5000 ± 0.0000"
    assert common.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_runs_are_deleted_unless_their_folder_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["study"])
    with common.open_study(common.arguments("A study.")) as given:
        (given.runs / "x").mkdir()
    assert not given.runs.exists()
    assert (given.seeds, given.json, given.overrides) == (3, None, [])
    monkeypatch.setattr(sys, "argv", ["study", "--runs", str(tmp_path), "seed=1"])
    with common.open_study(common.arguments("A study.")) as given:
        (given.runs / "x").mkdir()
    assert (tmp_path / "x").exists()
    assert given.overrides == ["seed=1"]


def test_priorities_are_drawn_and_tabled_alike_every_time(tmp_path: Path) -> None:
    bpr = load("bpr")
    curves = {how: [[0.5, 0.6 + i / 100] for i in range(len(bpr.CAPACITIES))] for how in bpr.PRIORITIES}
    curves["max"][0] = [0.75, 0.5]
    lines = bpr.markdown(curves, [0.5, 0.5]).splitlines()
    assert lines[0].startswith("| C | order of tokens | by largest weight | by summed weights |")
    assert lines[2] == "| 0.1 | 55.0 ± 7.1 | 62.5 ± 17.7 | 55.0 ± 7.1 | +25.0, -10.0 |"
    assert lines[-1].startswith("| no limit | 50.0 ± 0.0 |")
    assert len(lines) == 3 + len(bpr.CAPACITIES)
    for name in ("once.svg", "again.svg"):
        bpr.draw(curves, tmp_path / name)
    assert (tmp_path / "once.svg").read_text() == (tmp_path / "again.svg").read_text()
    for label in bpr.PRIORITIES.values():
        assert label in (tmp_path / "once.svg").read_text()
