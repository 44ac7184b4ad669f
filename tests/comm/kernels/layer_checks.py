"""Dispatch and a whole MoE layer by the kernels, against plain references; `test_kernels.py` runs this file."""

import itertools
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from tests import distributed
from tests.comm.reference import make_case, reference, run_layer
from twohop.comm import Topology, build_dispatcher
from twohop.comm.kernels import fused
from twohop.models.config import Activation, ModelConfig, MoEConfig, RouterConfig
from twohop.models.experts import Experts
from twohop.models.moe import MoELayer

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts" / "bench"))

import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALGORITHMS = ("flat", "hierarchical", "dedup")


def layers_on_this_rank(case: list, num_experts: int) -> list[dict]:
    """With one chunk and with two."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=60)
    assert fused(torch.empty(0, device=topology.device))
    results = []
    for chunks in (1, 2):
        by_name = {n: run_layer(topology, n, case, num_experts, chunks=chunks) for n in ALGORITHMS}
        results.append({n: {k: r[k] for k in ("y", "x", "weights", "experts")} for n, r in by_name.items()})
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="several ranks on one GPU: tests/comm/test_nccl.py")
def test_dispatch_among_ranks_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    # Forked from here, where Triton has been imported for its interpreter.
    monkeypatch.setattr(distributed, "_context", multiprocessing.get_context("fork"))
    monkeypatch.setattr(distributed, "_workers", [])
    case = make_case(0, [5, 3, 0, 4], 3, 8, 4, torch.float32, "drop")
    results = distributed.run_distributed(layers_on_this_rank, 4, case, 8, timeout=120)
    expected = reference(case, 8)
    bound = 100 * torch.finfo(torch.float32).eps  # sums of some ten terms of size about 1
    for rank, by_chunks in enumerate(results):
        for by_name, key in itertools.product(by_chunks, ("y", "x", "weights")):
            for name in ALGORITHMS:
                assert torch.equal(by_name[name][key], by_name["flat"][key]), (name, key, rank)
            torch.testing.assert_close(by_name["flat"][key], expected[key][rank], rtol=bound, atol=bound)


def make_layer(top_k: int, capacity_factor: float | None, activation: Activation, dtype: torch.dtype) -> MoELayer:
    moe = MoEConfig(experts=[4], capacity_factor=capacity_factor, min_capacity=1, router=RouterConfig(top_k=top_k))
    config = ModelConfig(dim=8, num_layers=2, num_heads=2, ffn_dim=12, activation=activation, moe=moe)
    layer = MoELayer(config, build_dispatcher("flat", Topology.one_process(), 4))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return layer.to(DEVICE, dtype)


def output_and_gradients(layer: MoELayer, x_BTD: torch.Tensor) -> list[torch.Tensor]:
    x_BTD = x_BTD.clone().requires_grad_()
    y_BTD, stats = layer(x_BTD)
    factors_BTD = torch.linspace(-1, 1, y_BTD.numel(), device=DEVICE).view_as(y_BTD)
    loss = (y_BTD * factors_BTD).sum() + sum(stats.losses.values())
    return [y_BTD.detach(), *torch.autograd.grad(loss, [x_BTD, *layer.parameters()])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "capacity_factor"), [(1, 0.5), (3, 0.75), (2, None)])
@pytest.mark.parametrize("activation", [Activation.gelu, Activation.swiglu])
def test_counts_on_the_device_change_nothing(top_k, capacity_factor, activation, dtype, monkeypatch) -> None:
    """A plan that is made without the host, whose dropped assignments have rows, gives what the other gives."""
    layer = make_layer(top_k, capacity_factor, activation, dtype)
    x_BTD = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    on_device = output_and_gradients(layer, x_BTD)
    monkeypatch.setattr(Experts, "counts_on_device", False)
    on_host = output_and_gradients(layer, x_BTD)
    for ours, theirs in zip(on_device, on_host, strict=True):
        bound = 100 * torch.finfo(dtype).eps  # products of another height may be cut in another way
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_the_host_reads_no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(2, 0.5, Activation.gelu, torch.float32)
    seen = []
    forward = Experts.network
    monkeypatch.setattr(Experts, "network", lambda *args: seen.append(args[-1]) or forward(*args))
    output_and_gradients(layer, torch.randn(2, 5, 8).to(DEVICE))
    (counts_E,) = seen
    assert counts_E.device.type == DEVICE
    assert counts_E.tolist() == [int(c) for c in counts_E]
    assert counts_E.sum() < 20  # something was dropped


def test_a_kept_plan_needs_no_host_either() -> None:
    layer = make_layer(2, 0.5, Activation.gelu, torch.float32)
    x_ND = torch.randn(10, 8, device=DEVICE)
    ids_NK, weights_NK = torch.randint(-1, 4, (10, 2), device=DEVICE), torch.rand(10, 2, device=DEVICE)
    planned = layer.dispatcher.plan(x_ND, ids_NK, weights_NK, True)

    def run(plan) -> tuple[torch.Tensor, torch.Tensor]:
        leaf_ND = x_ND.clone().requires_grad_()
        experts = layer.experts.begin(leaf_ND)
        y_ND, _ = layer.dispatcher.follow(plan, leaf_ND, experts, experts.open)
        y_ND.square().sum().backward()
        return y_ND.detach(), leaf_ND.grad

    for now, again in zip(run(planned), run(planned.kept()), strict=True):
        assert torch.equal(now, again)


def test_layers_of_the_benchmark_give_what_its_reference_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(gpu.SHAPES, "fine", gpu.SHAPES["fine"]._replace(num_experts=16))
    small = ["--tokens", "8", "--shrink", "64", "--json", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", DEVICE, *small])
    assert gpu.main() == 0
    assert "fine: twohop, transformers, grouped_mm, textbook, spread and sum give what" in capsys.readouterr().out
