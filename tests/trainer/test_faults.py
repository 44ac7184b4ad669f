"""What ranks leave behind when training fails."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import write_corpus
from twohop.comm import CommError
from twohop.trainer import loop
from twohop.trainer.errors import UserError
from twohop.trainer.faults import recording_faults
from twohop.trainer.monitoring.progress import Progress
from twohop.trainer.world import rank


def hang_on_rank_1(directory: Path) -> str:
    """Rank 1 stays in the data of step 2 until its own file tells of it, and then fails."""
    run = runs.start(directory, "comm.timeout_s=60", "comm.ep_size=2")
    run.config.comm.timeout_s = 2.0  # of the watch alone: the groups have theirs
    run.directory.mkdir(exist_ok=True)
    batch, told = run.data.train.batch, run.directory / "faults" / "rank-1.json"
    loop.train_step(run, 0)

    def hang(numbers: list[int]) -> Any:
        if rank() == 1:
            while not told.exists():
                time.sleep(0.05)
            raise OSError("the disk has come back")
        return batch(numbers)

    object.__setattr__(run.data.train, "batch", hang)
    try:
        loop.train(run, 1, "", None, Progress(run.config.train.steps, False))
    except (CommError, OSError) as error:
        return str(error)
    return ""


def test_a_rank_that_hangs_leaves_where_it_is_and_so_does_one_that_waits_for_it(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    errors = run_distributed(hang_on_rank_1, 2, tmp_path, init=False)
    assert "MoE layer 0" in errors[0]
    folder = tmp_path / "run" / "faults"
    waiting, hanging = ((folder / f"rank-{number}.txt").read_text() for number in (0, 1))
    assert "step 2: forward > dispatch (MoE layer 0) > exposed communication (MoE layer 0, counts)" in waiting
    assert errors[0] in waiting
    assert "rank 1 of 2\nstep 2: data\n\nIt has been in this step for more than 2 s." in hanging
    assert "in hang\n" in hanging  # the stack
    assert "OSError: the disk has come back" in hanging
    for number in (0, 1):
        recorded = json.loads((folder / f"rank-{number}.json").read_text())
        assert "gloo:all_reduce" in {entry["profiling_name"] for entry in recorded["entries"]}


def test_a_failure_leaves_the_phase_and_the_stack_of_its_rank(tmp_path: Path) -> None:
    run = runs.start(tmp_path)
    run.directory.mkdir(exist_ok=True)

    def fail(step: str, error: Exception) -> None:
        with recording_faults(run), run.clock.running(step), run.clock.phase("optimizer"):
            raise error

    with pytest.raises(UserError):
        fail("step 6", UserError("the loss is nan"))
    assert not (run.directory / "faults").exists()
    with pytest.raises(OSError, match="the disk is gone"):
        fail("step 7", OSError("the disk is gone"))
    text = (run.directory / "faults" / "rank-0.txt").read_text()
    assert "rank 0 of 1\nstep 7: optimizer\n\nTraceback (most recent call last)" in text
    assert "in fail\n" in text
    assert "OSError: the disk is gone" in text
