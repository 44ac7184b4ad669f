"""Time, memory, traffic and utilisation of a step."""

import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config, write_corpus
from twohop.models.flops import training_flops
from twohop.trainer.config import MetricsConfig
from twohop.trainer.loop import train_step
from twohop.trainer.monitoring.accelerators import peak_flops
from twohop.trainer.monitoring.resources import resources_of_world

SLEEP_S = 0.02
PHASES = {
    "data", "forward", "dispatch", "experts", "combine", "backward", "optimizer", "exposed communication", "other",
}  # fmt: skip


def steps_with_a_slow_rank(directory: Path) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    """Two steps in which rank 1 reads its data slowly; what this rank's clock said of the second, and its memory."""
    run = runs.start(directory, "metrics.peak_tflops=0.5", "comm.chunks=2")
    laps, lap = [], run.clock.lap
    run.clock.lap = lambda: laps.append(lap()) or laps[-1]  # type: ignore[method-assign, func-returns-value]
    batch = run.data.train.batch

    def slow_batch(numbers: list[int]) -> Any:
        if run.topology.rank == 1:
            time.sleep(SLEEP_S)
        return batch(numbers)

    object.__setattr__(run.data.train, "batch", slow_batch)
    records = [train_step(run, step) for step in range(2)]
    return records, laps[1], psutil.Process().memory_info().rss


def test_a_record_says_where_the_time_of_all_ranks_went(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (records, first, size_0), (others, second, size_1) = run_distributed(
        steps_with_a_slow_rank, 2, tmp_path, init=False
    )
    assert records == others
    record = records[1]
    assert set(record["phase_s"]) == set(record["phase_max_s"]) == PHASES
    for name in PHASES:
        assert record["phase_s"][name] == pytest.approx((first[name] + second[name]) / 2)
        assert record["phase_max_s"][name] == max(first[name], second[name])
        assert record["phase_s"][name] > 0
    assert sum(record["phase_s"].values()) == pytest.approx(record["step_s"])
    assert record["targets_per_s"] == pytest.approx(record["targets"] / record["step_s"])
    assert second["data"] >= 2 * SLEEP_S  # rank 1 has two micro-batches
    assert record["peak_memory"] >= 0.5 * max(size_0, size_1)  # of processes that other tests may have used before
    config = tiny_config(tmp_path).model
    config.vocab_size = 257
    needed = training_flops(config, 16)
    assert needed is not None
    assert record["mfu"] == pytest.approx(needed * record["targets"] / record["step_s"] / (2 * 0.5e12))


def test_ranks_need_not_have_the_same_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        ({"inside node": {"dispatch": (10, 1)}}, {"forward": 1.0, "other": 2.0}, 30),
        ({"inside node": {"dispatch": (5, 2), "combine": (1, 1)}}, {"data": 1.0, "forward": 2.0}, 40),
    ]
    monkeypatch.setattr("twohop.trainer.monitoring.resources.gather_objects", lambda own: ranks)
    run: Any = Mock(device=torch.device("cpu"), config=tiny_config(tmp_path), flops_per_target=None)
    assert resources_of_world(run, 12) == {
        "traffic": {"inside node": {"dispatch": [15, 3], "combine": [1, 1]}},
        "step_s": 3.0,
        "phase_s": {"forward": 1.5, "other": 1.0, "data": 0.5},
        "phase_max_s": {"forward": 2.0, "other": 2.0, "data": 1.0},
        "targets_per_s": 4.0,
        "mfu": None,
        "peak_memory": 40,
    }


def test_the_clock_counts_a_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, seen by a clock around it: what is missing is in the next step, which begins where this one ended."""
    run = runs.start(tmp_path)
    marks: list[tuple[float, str | None]] = run.clock._marks
    mark = run.clock._mark
    monkeypatch.setattr(run.clock, "_mark", lambda name: (mark(name), marks.append(run.clock._marks[-1])))
    record = train_step(run, 0)
    begun, over = marks[0][0], run.clock._marks[0][0]  # of the step, and of its lap
    assert record["step_s"] == pytest.approx(over - begun)
    assert run.clock._marks[-1][1] is None  # what comes before the next step is not counted
    assert record["mfu"] is None  # nobody knows the peak of this processor


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H20", 148e12, 44e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA L40", None, None),
    ],
)
def test_peaks_of_accelerators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bf16: float | None, fp32: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for precision, peak in (("bf16", bf16), ("fp32", fp32)):
        assert peak_flops(tiny_config(tmp_path, f"engine.precision={precision}"), torch.device("cuda", 0)) == peak
    assert peak_flops(tiny_config(tmp_path), torch.device("cpu")) is None
    assert peak_flops(tiny_config(tmp_path, "metrics.peak_tflops=7"), torch.device("cuda", 0)) == 7e12


def test_a_peak_is_positive() -> None:
    with pytest.raises(ValueError, match=r"metrics\.peak_tflops=0: use a positive number"):
        MetricsConfig(peak_tflops=0)
