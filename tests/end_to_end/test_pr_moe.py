"""PR-MoE on 8 ranks: layers of 2, 4 and 8 experts run EP 2, 4 and 8 side by side (multi-expert, multi-data).

Each layer's experts have replicas of their own number, 4, 2 and 1, and their gradients are summed over those alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config, write_corpus
from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.models import ModelConfig, MoEConfig, MoELayer, RouterConfig, Routing
from twohop.models.config import Residual
from twohop.trainer.launching import workers
from twohop.trainer.loop import train_step
from twohop.trainer.monitoring.metrics import read_metrics

PYRAMID = ["model.num_layers=3", "model.moe.every=1", "model.moe.experts='[2] + [4] + [8]'", "model.moe.router.top_k=1",
           "model.moe.shared_ffn_dim=0", "train.global_batch=16", "train.steps=2"]  # fmt: skip
EXPERTS = {"blocks.0.moe": 2, "blocks.1.moe": 4, "blocks.2.moe": 8}
Layout = dict[str, tuple[int, int, int]]  # layer -> EP size, EDP size, EP rank


def first_gradients(directory: Path, overrides: Sequence[str]) -> tuple[Layout, dict[str, Tensor], dict[str, Any]]:
    """Where each layer's experts live, gradients of the first step before clipping, and the step's record; in fp64."""
    run = runs.start(directory, *overrides, "optim.clip_norm=null")
    run.model.double()
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.engine.optimizer.register_step_pre_hook(keep)
    record = train_step(run, 0)
    topologies = {name: layer.dispatcher.topology for name, layer in run.model.moe_layers()}
    return {name: (t.ep_size, t.edp_size, t.ep_rank) for name, t in topologies.items()}, gradients, record


@pytest.mark.parametrize("residual", ["sum", "learned"])
def test_every_layer_has_its_own_ep_size_and_the_gradients_of_one_process(tmp_path: Path, residual: str) -> None:
    write_corpus(tmp_path)
    settings = [*PYRAMID, f"model.moe.residual={residual}"]
    ((_, whole, reference),) = run_distributed(first_gradients, 1, tmp_path, settings, init=False)
    found = run_distributed(first_gradients, 8, tmp_path, [*settings, "comm.ranks_per_node=4"], init=False)
    for layout, gradients, record in found:
        assert [sizes[:2] for sizes in layout.values()] == [(2, 4), (4, 2), (8, 1)]
        assert gradients.keys() == whole.keys()
        for name, gradient in gradients.items():
            layer, is_expert, _ = name.partition(".experts.")
            ep_size, _, ep_rank = layout[layer] if is_expert else (1, 1, 0)
            # Sums of some 256 terms in fp64, in another order.
            torch.testing.assert_close(gradient, whole[name].chunk(ep_size)[ep_rank], rtol=1e-11, atol=1e-14, msg=name)
        assert record["loss"] == pytest.approx(reference["loss"], rel=1e-12)
        assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-12)
        for name, layer in record["moe"].items():
            # A mean of weights that are added up in another order; all else is counted.
            confidence, expected = layer.pop("confidence"), dict(reference["moe"][name])
            assert confidence == pytest.approx(expected.pop("confidence"), rel=1e-12)
            assert layer == expected
        assert {layer: len(stats["load"]) for layer, stats in record["moe"].items()} == EXPERTS
    ranks = [{layer: ep_rank for layer, (_, _, ep_rank) in layout.items()} for layout, _, _ in found]
    assert [rank["blocks.2.moe"] for rank in ranks] == list(range(8))
    assert [rank["blocks.0.moe"] for rank in ranks] == [0, 1] * 4


def payload_of_a_layer(residual: Residual, top_k: int) -> dict[str, int]:
    """Bytes that this rank sends for rows, forward and backward; none of its tokens has an expert at home."""
    topology, meter = Topology.discover(ranks_per_node=1, timeout_s=20), TrafficMeter()
    config = ModelConfig(dim=8, ffn_dim=16, moe=MoEConfig(4, residual=residual, router=RouterConfig(top_k=top_k)))
    layer = MoELayer(config, build_dispatcher("flat", topology, 4, meter=meter))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    away = (topology.rank + 1 + torch.rand(24, 3).argsort(-1)) % 4
    routing = Routing(away[:, :top_k], torch.ones(24, top_k), {}, torch.zeros(4, dtype=torch.int64))
    layer.router.forward = lambda *_: routing
    layer(torch.randn(1, 24, 8, requires_grad=True))[0].square().sum().backward()
    phases = ("dispatch", "combine", "dispatch backward", "combine backward")
    return {phase: meter.bytes_sent("between nodes", phase) for phase in phases}


def test_one_expert_and_a_residual_mlp_send_half_of_what_two_experts_send() -> None:
    ones = run_distributed(payload_of_a_layer, 4, Residual.sum, 1)
    twos = run_distributed(payload_of_a_layer, 4, Residual.none, 2)
    for phase in ones[0]:
        one, two = (sum(rank[phase] for rank in ranks) for ranks in (ones, twos))
        assert two == 2 * one == 2 * 4 * 24 * 8 * 4, phase


def evaluate(directory: Path, overrides: Sequence[str]) -> float:
    return workers.evaluate(tiny_config(directory, *overrides), directory / "run").get("valid_loss", 0.0)


def test_metrics_report_and_checkpoint_have_every_layer(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    settings = [*PYRAMID, "model.moe.residual=sum"]
    summary, *_ = run_distributed(runs.train_run, 8, tmp_path, [*settings, "comm.ranks_per_node=4"], init=False)
    steps = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    for record in steps:
        assert {layer: len(stats["load"]) for layer, stats in record["moe"].items()} == EXPERTS
        assert all(sum(stats["load"]) == pytest.approx(1) for stats in record["moe"].values())
    report = (tmp_path / "run" / "report.html").read_text()
    for layer, experts in EXPERTS.items():
        assert f"{layer}  ·  {experts} experts" in report
    for nproc in (1, 2):
        valid_loss, *_ = run_distributed(evaluate, nproc, tmp_path, settings, init=False)
        assert valid_loss == pytest.approx(summary["valid_loss"], rel=1e-6)
