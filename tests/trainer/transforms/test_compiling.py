"""Compiled regions: no breaks, one graph for layers that look alike, and the same training.

Dynamo and AOTAutograd are tested, whose graphs run operation by operation: code of Inductor takes a minute to make.
"""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler

from tests.distributed import run_distributed
from tests.tiny import ENGINES, tiny_config
from tests.trainer.test_engine import batch, loss_of
from twohop.comm import Topology, build_dispatcher
from twohop.models import MoEModel, build_model, init_weights
from twohop.models.attention import AttentionBase
from twohop.models.feed_forward import FeedForward
from twohop.trainer.engines import build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.transforms import compiling
from twohop.trainer.transforms.compiling import compile_regions
from twohop.trainer.transforms.recompute import recompute_activations
from twohop.trainer.world import rank


def compiled(model: MoEModel) -> None:
    torch._dynamo.reset()
    counters.clear()
    compile_regions(model, backend="aot_eager")


def gradients(model: MoEModel) -> list[torch.Tensor]:
    torch.manual_seed(0)
    loss_of(model, batch(0, 0)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("attention", [["kind=full"], ["kind=adaptive_span", "window=8", "span_loss=0.1"]])
def test_there_are_no_breaks_and_few_graphs(tmp_path: Path, attention: list[str]) -> None:
    overrides = ["model.vocab_size=32", *(f"model.attention.{option}" for option in attention)]
    config = tiny_config(tmp_path, *overrides)
    results = []
    for prepare in (lambda model: None, compiled):
        model = build_model(config.model)
        init_weights(model, 0)
        prepare(model)
        results.append(gradients(model.train()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    # Norm, attention, activation, and dense networks, of which the tiny model has three kinds. It has four blocks.
    assert 3 <= counters["stats"]["unique_graphs"] <= 6
    seen = counters["stats"]["unique_graphs"]
    loss_of(model.train(), batch(0, 1)).backward()  # another number of rows at each expert
    loss_of(model.eval(), batch(0, 1)[:1])
    with torch.no_grad():
        loss_of(model.train(), batch(0, 1)[:1])
    assert counters["stats"]["unique_graphs"] == seen


def test_every_region_is_one_graph_and_nothing_in_it_is_compiled_apart(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "model.attention.qk_norm=head")
    model = build_model(config.model)
    with patch.object(compiling.torch, "compile", side_effect=lambda compute, **options: compute) as compiler:
        compile_regions(model, backend="eager")
    calls = [(call.args[0].__self__, call.kwargs) for call in compiler.call_args_list]
    outside = {module for block in model.every_block() for module in block.modules() if isinstance(module, nn.RMSNorm)}
    inside = {n for a in model.modules() if isinstance(a, AttentionBase) for n in a.modules() if n is not a}
    regions = {m for m in model.modules() if isinstance(m, (AttentionBase, FeedForward))} | (outside - inside)
    experts = {layer.experts for _, layer in model.moe_layers()}
    assert inside & outside
    assert {module for module, _ in calls} >= regions | experts
    assert len(calls) == len({module for module, _ in calls})
    assert not inside & {module for module, _ in calls}
    assert all(options["fullgraph"] for _, options in calls)
    assert {module for module, options in calls if options["dynamic"]} == experts
    assert torch._dynamo.config.recompile_limit == 256  # layers that differ have graphs of their own


def trained(directory: Path, engine: str, recompute: str) -> list[float]:
    """Loss and gradient norm of two steps as they are, and compiled."""
    results: list[float] = []
    topology = Topology.discover()
    for prepare in (lambda model: None, compiled):
        config = tiny_config(directory, *ENGINES[engine], f"train.recompute={recompute}", "model.vocab_size=32")
        model = build_model(config.model, lambda i, n: build_dispatcher("dedup", topology.with_ep([1, 2][i]), n))
        init_weights(model, 0)
        prepare(model)
        recompute_activations(model, config.train.recompute)
        built = build_engine(model, config)
        for step in range(2):
            torch.manual_seed(step)
            loss = loss_of(built.model.train(), batch(step, rank()))
            built.backward(loss, True)
            results += [loss.item(), built.step(1.0)]
    assert not counters["graph_break"]
    return results


@pytest.mark.parametrize(("engine", "recompute"), [("fsdp", "full"), ("zero-1", "networks"), ("zero-2", "none")])
def test_engines_and_recomputation_go_around_the_regions(tmp_path: Path, engine: str, recompute: str) -> None:
    tiny_config(tmp_path)
    for results in run_distributed(trained, 2, tmp_path, engine, recompute, timeout=120):
        assert results[4:] == pytest.approx(results[:4], rel=1e-5)


def test_without_a_compiler_there_is_one_line(tmp_path: Path) -> None:
    model = build_model(tiny_config(tmp_path, "model.vocab_size=32").model)
    with (
        patch.object(compiling, "get_cpp_compiler", side_effect=InvalidCxxCompiler),
        pytest.raises(ConfigError, match=r"train\.compile=true: there is no C\+\+ compiler .* install g\+\+"),
    ):
        compile_regions(model)
    with pytest.raises(ValueError, match=r"train\.recompute=selective has no use with train\.compile=true"):
        tiny_config(tmp_path, "train.compile=true", "train.recompute=selective")
