"""Saves in the background: what is written is the state of the step, training goes on, and failures come out."""

import errno
import os
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end.runs import start
from tests.tiny import tiny_config, write_corpus
from tests.trainer.checkpoints.test_checkpoint import whole
from twohop.trainer.checkpoints import checkpoint
from twohop.trainer.checkpoints.checkpoint import load_tensors
from twohop.trainer.checkpoints.saver import Saver
from twohop.trainer.config import CheckpointConfig
from twohop.trainer.errors import CheckpointError
from twohop.trainer.launching.workers import train
from twohop.trainer.loop import train_step
from twohop.trainer.setup import Run
from twohop.trainer.world import gather_objects, rank

BACKGROUND = "checkpoint.asynchronous=true"


def hold_writing(run: Run) -> threading.Semaphore:
    """Every later save of this rank waits for a permit before it begins to write."""
    permits, save = threading.Semaphore(0), run.checkpoints.save

    def wait_and_save(*args: Any) -> Any:
        assert permits.acquire(timeout=120)
        return save(*args)

    run.checkpoints.save = wait_and_save  # type: ignore[method-assign]
    return permits


def train_while_saving(directory: Path, engine: str) -> tuple[bool, int, list[str], int]:
    """Train on while the state after the first step waits to be written, and save again while it still does."""
    run = start(directory, BACKGROUND, engine)
    saver, permits = Saver(run, "id"), hold_writing(run)
    train_step(run, 0)
    expected = whole(run.state())
    saver.save(1)
    train_step(run, 1)
    saver.check()
    early = run.checkpoints.directory.exists()
    gather_objects(None)
    permits.release()
    train_step(run, 2)  # maybe while the threads write: the training's messages and theirs do not meet
    saver.save(3)  # waits for the first
    first = run.checkpoints.latest()
    assert first is not None
    gather_objects(None)
    permits.release()
    saver.finish()
    last = run.checkpoints.latest()
    assert last is not None
    state = run.state()
    load_tensors(first, state, run.identity())
    different = [name for name, tensor in whole(state).items() if not torch.equal(tensor, expected[name])]
    return early, first.step, different, last.step


@pytest.mark.parametrize(("nproc", "engine"), [(2, "ddp"), (2, "fsdp"), (1, "ddp")])
def test_a_save_in_the_background_holds_the_state_of_its_step(tmp_path: Path, nproc: int, engine: str) -> None:
    write_corpus(tmp_path)
    found = run_distributed(train_while_saving, nproc, tmp_path, f"engine.name={engine}", init=False, timeout=180)
    assert found == [(False, 1, [], 3)] * nproc


def write_to_a_full_disk(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_the_disk_of_rank_1(directory: Path) -> tuple[str, list[str]]:
    """Train on after a save in the background that rank 1 cannot write."""
    run = start(directory, BACKGROUND)
    saver = Saver(run, "id")
    saver.save(1)
    saver.finish()
    problem, write = "", checkpoint._Writer.write_data
    if rank() == 1:
        checkpoint._Writer.write_data = write_to_a_full_disk  # type: ignore[method-assign]
    try:
        saver.save(2)
        for step in range(1000):
            train_step(run, step)
            saver.check()
    except CheckpointError as error:
        problem = str(error)
    finally:
        checkpoint._Writer.write_data = write  # type: ignore[method-assign]
    saver.finish()  # what has been told is not told again
    gather_objects(None)
    return problem, sorted(path.name for path in run.checkpoints.directory.iterdir())


def test_a_save_that_fails_in_the_background_ends_training_with_the_reason_on_every_rank(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    for problem, left in run_distributed(fill_the_disk_of_rank_1, 2, tmp_path, init=False, timeout=180):
        assert "step-00000002: rank 1: No space left on device; free some space" in problem
        assert "step-00000001 is whole" in problem
        assert left == ["step-00000001"]


def check_what_rank_1_knows_first(directory: Path) -> str:
    """A save has failed, and rank 0's thread has yet to say so."""
    run = start(directory, BACKGROUND)
    saver = Saver(run, "id")
    saver._pending = Future()
    fail = partial(saver._pending.set_exception, CheckpointError("the disk is gone"))
    if rank() == 1:
        fail()
    else:
        threading.Timer(0.5, fail).start()
    try:
        saver.check()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def test_a_failure_that_one_rank_knows_of_ends_the_step_of_all(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    assert run_distributed(check_what_rank_1_knows_first, 2, tmp_path, init=False) == ["the disk is gone"] * 2


def test_the_end_of_a_run_waits_for_its_last_save(tmp_path: Path) -> None:
    settings = ["train.steps=2", "generate.max_new_tokens=0", BACKGROUND]
    train(tiny_config(tmp_path, *settings), None)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_milestones_that_never_become_checkpoints_are_refused() -> None:
    CheckpointConfig(every=50, keep_every=100)
    for every in (0, 30):
        with pytest.raises(ValueError, match=rf"keep_every=100 is no multiple of checkpoint\.every={every}"):
            CheckpointConfig(every=every, keep_every=100)
