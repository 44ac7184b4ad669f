"""Code on the pages runs, and does what they say."""

import importlib
import math
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.docs.pages import ROOT, in_module_of, snippet
from tests.tiny import tiny_config
from twohop.comm import Topology, build_dispatcher
from twohop.comm.routes import ROUTES
from twohop.comm.wire import FORMATS
from twohop.comm.wiring import Wires
from twohop.models import ModelConfig
from twohop.models.attention import build_attention
from twohop.models.attention.attend import dense_mask
from twohop.models.config import Activation, RouterConfig
from twohop.models.config.attention import AttentionConfig
from twohop.models.interop import FAMILIES, differences
from twohop.models.interop.family import read_config as read_hf_config
from twohop.models.interop.family import write_config as write_hf_config
from twohop.models.routers import ROUTERS, TokenInfo, build_router
from twohop.models.routers.losses import LOSSES
from twohop.trainer.launching.workers import train
from twohop.trainer.monitoring.metrics import read_metrics


@pytest.mark.usefixtures("examples")
def test_router_engine_tracker_and_data_source_of_the_guide_train_a_model(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("CONTRIBUTING", "README"):
        (tmp_path / "text" / f"{name}.md").write_text((ROOT / f"{name}.md").read_text())
    losses = {}
    for engine in ("single", "ddp"):
        run_dir = tmp_path / engine
        run_dir.mkdir()
        config = tiny_config(
            tmp_path,
            f"engine.name={engine}",
            "tracker.name=table",
            "model.moe.router.name=cosine",
            "model.moe.router.jitter=0",
            "data.source=markdown",
            f"data.files={tmp_path / 'text'}",
            "train.steps=3",
        )
        train(config, run_dir)
        losses[engine] = [record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"]
        assert f"3,train/loss,{losses[engine][-1]}" in (run_dir / "numbers.csv").read_text()
    assert losses["single"] == pytest.approx(losses["ddp"], rel=1e-5)
    assert len(set(losses["single"])) == 3


def test_loss_of_the_guide_is_added_to_those_of_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    exec(snippet("CONTRIBUTING.md", "models/routers/losses.py"), names := in_module_of("models/routers/losses.py"))
    added = eval("{" + snippet("CONTRIBUTING.md", "LOSSES of models/routers/losses.py") + "}", names)
    for name, loss in added.items():
        monkeypatch.setitem(LOSSES, name, loss)
    monkeypatch.setattr(ROUTERS["softmax_topk"], "options", ROUTERS["softmax_topk"].options | {"entropy_loss"})
    config = make_dataclass("WithEntropy", [("entropy_loss", float, 0.0)], bases=(RouterConfig,))(entropy_loss=0.5)
    router = build_router(config, 8, 4)
    torch.nn.init.zeros_(router.gate.weight)  # hesitates as much as it can
    assert router(torch.randn(6, 8), TokenInfo(1)).losses["entropy"].item() == pytest.approx(0.5 * math.log(4))


@pytest.mark.usefixtures("examples")
def test_attention_pattern_of_the_guide_is_one_of_chunks() -> None:
    config = ModelConfig(attention=AttentionConfig(kind="chunked", window=3))
    mask = dense_mask(build_attention(config).mask, torch.empty(1, 1, 7, 1), 7, 0, 0)
    assert mask[0, 0].sum(-1).tolist() == [1, 2, 3, 1, 2, 3, 1]


def route_against_flat(route: str) -> bool:
    """Outputs and gradients of tokens, on this rank."""
    exec(route, names := in_module_of("comm/routes.py"))
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    torch.manual_seed(topology.rank)
    x_ND, weights_NK = torch.randn(24, 8), torch.rand(24, 3)
    ids_NK = torch.rand(24, 8).topk(3).indices
    results = []
    with pytest.MonkeyPatch.context() as patch:  # this process serves other tests as well
        patch.setitem(ROUTES, "outwards", names["outwards"])
        for name in ("flat", "outwards"):
            tokens_ND = x_ND.clone().requires_grad_()
            dispatcher = build_dispatcher(name, topology, 8)
            y_ND, _ = dispatcher.run(tokens_ND, ids_NK, weights_NK, lambda rows, counts: rows**2)
            y_ND.backward(x_ND)
            assert tokens_ND.grad is not None
            results.append(torch.stack([y_ND.detach(), tokens_ND.grad]))
    return torch.equal(*results)


def test_route_of_the_guide_agrees_with_flat_to_the_bit() -> None:
    assert run_distributed(route_against_flat, 4, snippet("CONTRIBUTING.md", "comm/routes.py")) == [True] * 4


@pytest.mark.usefixtures("examples")
def test_wire_format_of_the_guide_keeps_its_bound() -> None:
    x_RD = torch.randn(64, 33)
    back_RD = FORMATS["fp16"].decode(FORMATS["fp16"].encode(x_RD), torch.float32)
    error_RD = (back_RD - x_RD).abs() / x_RD.abs()
    assert FORMATS["fp16"].error / 4 < error_RD.max() <= FORMATS["fp16"].error
    build_dispatcher("dedup", Topology.one_process(), 4, wires=Wires.uniform("fp32", "fp16"))


def test_test_of_the_guide_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guide_example.py").write_text(snippet("CONTRIBUTING.md", "tests/comm/test_example.py"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("guide_example").test_every_rank_has_the_sum()


def run_script(code: str) -> None:
    exec(code, {})


def test_communication_layer_alone_works_as_printed() -> None:
    code = snippet("README.md", "example.py: torchrun --nproc-per-node 4 example.py")
    run_distributed(run_script, 4, code, init=False)


@pytest.mark.usefixtures("examples")
def test_family_of_the_guide_reads_what_it_writes() -> None:
    config = ModelConfig(vocab_size=257, activation=Activation.swiglu, num_kv_heads=2)
    written = write_hf_config(FAMILIES["mistral"], config)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert not differences(config, read_hf_config(FAMILIES["mistral"], written, "config.json"))
