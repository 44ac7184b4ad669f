"""Memory of real runs against `twohop plan`: with two ranks within 5 %, in one process within 1 %."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.distributed import run_distributed
from twohop.trainer.config import Recompute

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import run_memory as bench

MODEL = bench.MODEL | {"num_layers": 4, "moe": bench.MODEL["moe"] | {"experts": [4, 8]}}


def of_ranks(cases: list[bench.Case], folder: Path) -> list[dict[str, Any]]:
    """Each case on this world."""
    with patch.object(bench, "MODEL", MODEL):
        return [bench.compared(case, folder) for case in cases]


def test_memory_of_runs_is_as_planned(tmp_path: Path) -> None:
    """Of ddp, what it holds twice is its bucket; of the others, what they gather and send."""
    cases = [
        bench.Case("ddp", "fp32", (1, 2), 1, 1, 64),
        bench.Case("fsdp", "fp32", (1, 1), 2, 1, 64),
        bench.Case("zero1", "fp32", (1, 2), 1, 1, 64),
        bench.Case("zero2", "fp32", (1, 2), 2, 1, 64),
    ]
    for result in run_distributed(of_ranks, 2, cases, tmp_path, timeout=300)[0]:
        assert abs(result["error"]) < 0.05, bench.row(result)


def test_passes_are_those_of_a_real_run(tmp_path: Path) -> None:
    """In one process nothing is sent and no load is unequal, so what is left is rounding."""
    cases = [
        bench.Case("ddp", "bf16", (1, 1), 1, 2, 256, recompute=mode.value) for mode in (Recompute.none, Recompute.full)
    ]
    cases.append(bench.Case("ddp", "bf16_params", (1, 1), 1, 2, 256))
    for result in run_distributed(of_ranks, 1, cases, tmp_path, timeout=300)[0]:
        assert abs(result["error"]) < 0.01, bench.row(result)
