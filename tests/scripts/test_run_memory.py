"""Memory of real runs against `twohop plan`, with two ranks: every engine within 5 %, one process to the byte."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from twohop.trainer.config import Recompute

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import run_memory as bench

LIMIT = 0.05


def of_ranks(cases: list[bench.Case], folder: Path) -> list[dict[str, Any]]:
    """Each case on this world."""
    return [bench.compared(case, folder) for case in cases]


def test_memory_of_runs_is_as_planned(tmp_path: Path) -> None:
    cases = [
        bench.Case("ddp", "fp32", (1, 2, 2), 1, 4, 64),
        bench.Case("fsdp", "fp32", (1, 2, 1), 2, 4, 64),
        bench.Case("zero1", "fp32", (1, 2, 1), 1, 1, 64),
        bench.Case("zero2", "fp32", (1, 1, 2), 2, 1, 64),
    ]
    for result in run_distributed(of_ranks, 2, cases, tmp_path)[0]:
        assert abs(result["error"]) < LIMIT, bench.row(result)


@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
def test_passes_are_those_of_a_real_run(tmp_path: Path, precision: str) -> None:
    """In one process nothing is sent and no load is unequal, so what is left is rounding."""
    cases = [bench.Case("ddp", precision, (1, 1, 1), 1, 2, 256, recompute=mode.value) for mode in Recompute]
    for result in run_distributed(of_ranks, 1, cases, tmp_path)[0]:
        assert abs(result["error"]) < 0.01, bench.row(result)
