"""On a GPU that has all experts, nothing in a pass reads a value on the host: on fake tensors that is an error."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from twohop.comm import Topology, build_dispatcher, dispatcher, tree
from twohop.models.config import ModelConfig, MoEConfig, RouterConfig
from twohop.models.experts import ExpertPass, Experts
from twohop.models.moe import MoELayer
from twohop.trainer.transforms import fp8

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "bench"))

import gpu
from gpu_parts import Data, ours


def fake_spread(rows_PD: Any, children_C: Any, offsets: Any, dtype: Any = None) -> torch.Tensor:
    return rows_PD.new_empty(len(children_C), rows_PD.shape[1], dtype=dtype)


def fake_sum(rows_CD: Any, children_C: Any, offsets: Any, weights_C: Any = None, dtype: Any = None) -> torch.Tensor:
    return rows_CD.new_empty(len(offsets) - 1, rows_CD.shape[1], dtype=dtype)


def fake_backward(grad_PD: Any, rows_CD: Any, children_C: Any, offsets: Any, weights_C: Any) -> tuple[Any, Any]:
    return torch.empty_like(rows_CD), torch.empty_like(weights_C)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways of a GPU, with kernels that only have shapes."""
    for module in (dispatcher, tree):
        monkeypatch.setattr(module, "fused", lambda tensor: True)
    for name, function in (("spread", fake_spread), ("segment_sum", fake_sum), ("weighted_spread", fake_backward)):
        monkeypatch.setitem(sys.modules, f"twohop.comm.kernels.{name}", SimpleNamespace(**{name: function}))


def one_pass(capacity_factor: float | None) -> torch.dtype:
    """Forward and backward on fake tensors, in bf16 by autocast; the dtype in which the experts got their rows."""
    seen: list[torch.dtype] = []
    moe = MoEConfig(experts=[4], capacity_factor=capacity_factor, router=RouterConfig(top_k=2, z_loss=0.1))
    carrier = build_dispatcher("dedup", Topology.one_process(), 4)
    with FakeTensorMode():
        layer = MoELayer(ModelConfig(dim=16, ffn_dim=32, moe=moe), carrier)

        class Watched(ExpertPass):
            def __call__(self, rows_RD: torch.Tensor, counts_E: Any) -> torch.Tensor:
                seen.append(rows_RD.dtype)
                return super().__call__(rows_RD, counts_E)

        layer.experts.begin = lambda like: Watched(layer.experts, like)
        x_BTD = torch.randn(2, 8, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD, stats = layer(x_BTD)
        (y_BTD.sum() + sum(stats.losses.values())).backward()
        assert y_BTD.dtype == x_BTD.grad.dtype == torch.float32
    return seen[0]


@pytest.mark.parametrize("capacity_factor", [1.0, None])
def test_nothing_reads_a_value(no_kernels: None, capacity_factor: float | None) -> None:
    assert one_pass(capacity_factor) is torch.bfloat16


def test_counts_on_the_host_are_read(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Experts, "counts_on_device", False)
    with pytest.raises(DataDependentOutputException):
        one_pass(1.0)


def test_fp8_reads_no_value() -> None:
    with FakeTensorMode():
        place_R, ends_E = fp8._places(torch.tensor([3, 3, 20], dtype=torch.int32), 25)
    assert (place_R.shape, ends_E.shape) == ((25,), (3,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")
def test_how_often_the_host_waits() -> None:
    sizes = gpu.SHAPES["fine"]._replace(dim=128, ffn_dim=64)
    data = Data.make(sizes, 256, "cuda")
    with torch.device("cuda"):
        layer = ours(data, sizes)
    layer.module.bfloat16()
    waits = gpu.waits_by_mode(layer, data, sizes)
    assert {mode: len(calls) for mode, calls in waits.items()} == {
        "capacity": 0,
        "dropless": 0,
        "dropless, counts on the host": 1,
    }
