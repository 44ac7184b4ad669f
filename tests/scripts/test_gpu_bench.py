"""`scripts/bench/gpu.py`: what it concludes from figures; its layers and checks run in `tests/comm/kernels`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import gpu  # noqa: E402


def event(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end))


def test_waits_of_the_profiler_itself_do_not_count() -> None:
    events = [
        event("cudaStreamSynchronize", 1, 2),
        event("counted", 3, 9),
        event("cudaLaunchKernel", 4, 5),
        event("cudaMemcpyAsync", 5, 6),
        event("cudaStreamSynchronize", 6, 7),
        event("cudaDeviceSynchronize", 10, 11),
    ]
    assert gpu.waits_inside(events, "counted") == ["cudaStreamSynchronize"]


def measured(share: float, peer: float, moves: float, waits: dict[str, int]) -> dict[str, Any]:
    layers = {"twohop": {"share": share}, "textbook": {"share": peer}}
    return {
        "layers": layers,
        "moves": {name: {"share": moves} for name in ("spread", "weighted sum")},
        "waits": {mode: ["cudaStreamSynchronize"] * count for mode, count in waits.items()},
    }


def test_goals_are_those_of_each_shape() -> None:
    waits = {"capacity": 0, "dropless": 1, "dropless, counts on the host": 1}
    good = {name: measured(share, 0.5, 0.8, waits) for name, share in gpu.LAYER_GOALS.items()}
    assert all(gpu.goals(good).values())
    bad = {"mixtral": measured(0.69, 0.7, 0.79, dict.fromkeys(waits, 2))}
    assert not any(gpu.goals(bad).values())
    assert len(gpu.goals(bad)) == len(gpu.goals({"mixtral": good["mixtral"]})) == 7  # a peer that is missing has none


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says where there is no GPU")
def test_without_a_gpu_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--json", str(tmp_path / "gpu.json")])
    assert gpu.main() == 1
    assert capsys.readouterr().out.startswith("there is no CUDA device here")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--device", "cpu"])
    assert gpu.main() == 1
    assert "TRITON_INTERPRET=1" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_a_gpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--tokens", "512", "--shrink", "8", "--rounds", "2", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *small])
    assert gpu.main() == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert set(result["shapes"]) == set(gpu.SHAPES)
    assert len(result["goals"]) == 2 * 8
