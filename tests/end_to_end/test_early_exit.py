"""Layer drop and early exit mean the same on any number of ranks."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import ENGINES, tiny_config, write_corpus
from twohop.trainer.launching import workers

DROPS = ("model.layer_drop=0.5", "train.steps=6", "model.init_std=0.2", "eval.exit_confidence=0.035")


def evaluate(directory: Path) -> dict[str, float]:
    """Of the run in `directory`/run."""
    return workers.evaluate(tiny_config(directory, *DROPS), directory / "run")


def test_layers_left_out_and_tokens_that_leave_do_not_depend_on_the_world(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    runs.train_run(tmp_path, DROPS)
    curve, _ = runs.curve(tmp_path, DROPS)
    record = evaluate(tmp_path)
    assert 1 < record["valid_depth"] < 4
    for nproc, engine in ((4, "ddp"), (2, "fsdp"), (2, "zero-2")):
        for found, _ in run_distributed(runs.whole_curve, nproc, tmp_path, (*DROPS, *ENGINES[engine]), init=False):
            for step, (ours, theirs) in enumerate(zip(found, curve, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-5), f"{engine}, step {step}"
    for found in run_distributed(evaluate, 4, tmp_path, init=False):
        assert found == pytest.approx(record, rel=1e-5)
