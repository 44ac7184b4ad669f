"""Workers that are killed are started again by torch's agent and go on; the soak's judgement."""

import json
import sys
import threading
from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_overrides

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import soak
from soak_workers import History, train


def test_a_killed_worker_is_started_again_and_the_epoch_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = soak.write_corpus(tmp_path, steps=12)
    steps = samples // soak.GLOBAL_BATCH
    lengths = [f"train.steps={steps}", "checkpoint.every=2", "checkpoint.asynchronous=true", "resume=auto"]
    lengths += ["model.num_layers=2", "model.moe.experts=[4]"]
    run_distributed(runs.train_run, 2, tmp_path, [*lengths, f"run.dir={tmp_path / 'whole'}"], init=False, timeout=180)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(soak, "KINDS", ("SIGKILL",))
    history, outcome = History(tmp_path / "history"), soak.Outcome()
    threading.Thread(target=soak.torment, args=(history, 1, 0, 2, outcome), daemon=True).start()
    train([*tiny_overrides(tmp_path), *lengths], history, 2, tmp_path / "logs")
    assert (outcome.problems, outcome.rounds, history.newest()) == ([], {"SIGKILL": 1}, 1)
    final, _ = history.final()
    assert soak.judge_samples(final, samples) == []
    assert soak.judge_records(tmp_path / "run", tmp_path / "whole") == []


def test_the_last_time_a_step_was_taken_counts(tmp_path: Path) -> None:
    history = History(tmp_path)
    for attempt, rank, steps in ((0, 0, {0: [1, 2], 1: [3]}), (0, 1, {0: [4]}), (1, 0, {1: [5]}), (1, 1, {1: [6]})):
        lines = ["123", *(json.dumps([step, samples]) for step, samples in steps.items())]
        history.path(attempt, rank).write_text("\n".join([*lines, "[2, [7"]))  # the last line is torn
    assert history.newest() == 1
    assert history.steps(0) == 2
    assert history.process(1, 1) == 123
    assert history.final() == ({0: [1, 2, 4], 1: [5, 6]}, 1)


def test_samples_that_are_missing_or_doubled_are_found() -> None:
    assert soak.judge_samples({0: list(range(8)), 1: list(range(8, 16))}, 16) == []
    assert soak.judge_samples({0: list(range(8))}, 16) == [
        "step 1 was not taken",
        "samples never seen: [8, 9, 10, 11, 12, 13, 14, 15], seen more than once: []",
    ]
    doubled = {0: [0, 0, *range(2, 8)], 1: list(range(8, 16))}
    assert soak.judge_samples(doubled, 16) == ["samples never seen: [1], seen more than once: [0]"]


def test_records_that_differ_are_found(tmp_path: Path) -> None:
    for name, losses in (("a", [1.0, 2.0]), ("b", [1.0, 2.0]), ("c", [1.0, 2.5]), ("d", [1.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i, "kind": "train", "loss": loss}) for i, loss in enumerate(losses)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    a, b, c, d = (tmp_path / name for name in "abcd")
    assert soak.judge_records(a, b) == []
    assert "2.0" in soak.judge_records(a, c)[0]
    assert soak.judge_records(a, d) == ["2 records, but 1 in the unbroken run"]
