"""A student learns the same from its teacher on any number of ranks."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import ENGINES, write_corpus

STUDENT = (
    "model.num_layers=2",
    "model.moe.experts=[4]",
    "model.dim=8",
    "distill.temperature=2",
    "distill.hint_blocks=[4,1]",
    "train.steps=6",
)


def test_distillation_does_not_depend_on_the_world_or_the_engine(tmp_path: Path) -> None:
    """The teacher's layers of 4 and 8 experts are spread over all ranks, the student's 4 over pairs."""
    write_corpus(tmp_path)
    teacher = tmp_path / "teacher"
    run_distributed(runs.train_run, 2, tmp_path, (f"run.dir={teacher}", "train.steps=4"), init=False)
    student = (*STUDENT, f"distill.teacher={teacher}")
    reference, weights = runs.whole_curve(tmp_path, student)
    for nproc, engine in ((4, "ddp"), (4, "fsdp"), (2, "zero-2")):
        overrides = (*student, *ENGINES[engine], "comm.ep_size=2")
        taught, wholes = zip(*run_distributed(runs.whole_curve, nproc, tmp_path, overrides, init=False), strict=True)
        for curve in taught:
            assert curve == taught[0]
            for step, (ours, theirs) in enumerate(zip(curve, reference, strict=True)):
                assert ours == pytest.approx(theirs, rel=1e-5), f"{engine}, step {step}"
        assert wholes[0]["model.hint.weight"] == pytest.approx(weights["model.hint.weight"], abs=1e-5)
    alone, _ = runs.curve(tmp_path, STUDENT[:3] + STUDENT[5:])
    assert alone[1] != pytest.approx(reference[1], rel=1e-3)
