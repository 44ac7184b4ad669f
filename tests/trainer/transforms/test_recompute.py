"""Activation checkpointing: the same bits as without, less memory, and nothing decided, counted or drawn twice."""

import gc
import weakref
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.models.test_encoder_decoder import inputs, is_target, make_config, side
from tests.tiny import ENGINES, tiny_config
from tests.trainer.test_engine import batch, whole
from twohop.comm import Topology, TrafficMeter, build_dispatcher
from twohop.models import MoEModel, build_model, init_weights
from twohop.models.attention import AttentionBase
from twohop.models.experts import Experts
from twohop.models.feed_forward import FeedForward
from twohop.models.grouped import grouped_linear
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter
from twohop.trainer.config import Recompute
from twohop.trainer.engines import build_engine
from twohop.trainer.objective import cross_entropy_sum
from twohop.trainer.transforms import recompute
from twohop.trainer.transforms.recompute import recompute_activations
from twohop.trainer.world import rank, sum_over_world

# Jitter and capacity are in the tiny model. What is counted globally would be wrong if it were counted twice.
OVERRIDES = ["model.vocab_size=32", "model.moe.router.load_balance_over=global_batch"]


def loss_of(model: MoEModel, ids_BT1: Tensor) -> tuple[Tensor, list[Tensor]]:
    output = model(ids_BT1[:, :-1])
    losses = [loss for stats in output.moe for loss in stats.losses.values()] + list(output.losses.values())
    loss = torch.stack([cross_entropy_sum(output.logits, ids_BT1[:, 1:]), *losses]).sum()
    return loss, [loss.detach(), *(stats.load_E for stats in output.moe)]


def steps_on_this_rank(directory: Path, engine: str, ep_sizes: list[int], mode: str, *overrides: str) -> dict[str, Any]:
    """A step of two micro-batches on each rank: everything that the world can tell of it."""
    config = tiny_config(directory, *ENGINES[engine], f"train.recompute={mode}", *OVERRIDES, *overrides)
    topology, meter = Topology.discover(), TrafficMeter()
    model = build_model(
        config.model,
        lambda i, n: build_dispatcher("dedup", topology.with_ep(ep_sizes[i]), n, chunks=2, meter=meter),
    )
    init_weights(model, 1)
    for _, layer in model.moe_layers():
        layer.router.sum_over_ranks = lambda load_E: sum_over_world(load_E, "loads")
    recompute_activations(model, config.train.recompute)
    built = build_engine(model, config)
    told: list[Tensor] = []
    built.model.train()
    for index in range(2):
        torch.manual_seed(index)
        with built.autocast():
            loss, seen = loss_of(built.model, batch(0, 2 * rank() + index))
        built.backward(loss, index == 1)
        told += seen
    norm = built.step(1.0)
    weights = [whole(parameter.detach()) for parameter in built.model.parameters()]
    return {"told": told + weights, "norm": norm, "traffic": meter.snapshot()}


def all_modes_on_this_rank(directory: Path, engine: str, ep_sizes: list[int], *overrides: str) -> dict[str, Any]:
    return {mode.value: steps_on_this_rank(directory, engine, ep_sizes, mode.value, *overrides) for mode in Recompute}


@pytest.mark.parametrize(
    ("engine", "nproc", "ep_sizes", "precision"),
    [
        ("ddp", 1, [1, 1], "fp32"),
        ("ddp", 2, [2, 2], "bf16"),
        ("fsdp", 2, [1, 2], "fp32"),
        ("zero-2", 2, [1, 2], "bf16"),
    ],
)
def test_nothing_changes_but_the_messages(
    tmp_path: Path, engine: str, nproc: int, ep_sizes: list[int], precision: str
) -> None:
    tiny_config(tmp_path)  # writes the corpus, once
    arguments = (tmp_path, engine, ep_sizes, f"engine.precision={precision}")
    for results in run_distributed(all_modes_on_this_rank, nproc, *arguments):
        plain = results.pop("none")
        for mode, ours in results.items():
            assert ours["norm"] == plain["norm"], mode
            assert all(torch.equal(a, b) for a, b in zip(ours["told"], plain["told"], strict=True)), mode
            for level, phases in plain["traffic"].items():
                for phase, (size, messages) in phases.items():
                    again = 2 if (mode, phase) == ("full", "dispatch") else 1
                    if (mode, phase) != ("full", "combine"):  # of which only what somebody needs is repeated
                        assert ours["traffic"][level][phase] == (again * size, again * messages), (mode, phase)


def peak_and_operations(directory: Path, mode: Recompute) -> tuple[int, int]:
    """Bytes alive at once, and operations of matrix products, of a pass forward and backward."""
    config = tiny_config(directory, *OVERRIDES)
    model = build_model(config.model)
    init_weights(model, 0)
    recompute_activations(model, mode)
    ids_BT1 = torch.cat([batch(0, index) for index in range(8)])
    tracker = MemTracker()
    tracker.track_external(model.train())
    with tracker:
        loss_of(model, ids_BT1)[0].backward()
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    with FlopCounterMode(display=False) as counter:
        loss_of(model, ids_BT1)[0].backward()
    return snapshot["Total"], counter.get_total_flops()


def test_each_mode_needs_less_memory_than_the_last_and_selective_repeats_no_product(tmp_path: Path) -> None:
    peaks, operations = zip(*(peak_and_operations(tmp_path, mode) for mode in Recompute), strict=True)
    assert all(less < more for more, less in pairwise(peaks))
    assert peaks[-1] < peaks[0] / 2
    assert operations[0] == operations[1] < operations[2] < operations[3]


class CountOfProducts(TorchDispatchMode):
    """How often each operation ran that multiplies matrices."""

    NAMES = ("mm", "bmm", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        self.counts[name] += name in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("attention", "special"), [("full", CountOfProducts.NAMES[-1]), ("linear", "bmm")])
def test_selective_keeps_products_of_every_kind(tmp_path: Path, attention: str, special: str) -> None:
    """torch's own count of operations knows neither grouped products nor attention on a CPU."""
    config = tiny_config(tmp_path, *OVERRIDES, f"model.attention.kind={attention}")
    counts = []
    for mode in (Recompute.none, Recompute.selective):
        model = build_model(config.model)
        init_weights(model, 0)
        recompute_activations(model, mode)
        with CountOfProducts() as counter:
            loss_of(model.train(), batch(0, 0))[0].backward()
        counts.append({name: count for name, count in counter.counts.items() if count})
    assert counts[0] == counts[1]
    assert counts[0].keys() == {"mm", "_grouped_mm", special}


def test_networks_computes_attention_experts_and_dense_networks_again(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *OVERRIDES)
    model = build_model(config.model)
    kinds = (AttentionBase, FeedForward, Experts)
    wanted = {module for module in model.modules() if isinstance(module, kinds)}
    assert {kind for kind in kinds for module in wanted if isinstance(module, kind)} == set(kinds)
    init_weights(model, 0)
    recompute_activations(model, Recompute.networks)
    with patch.object(recompute, "checkpoint", side_effect=recompute.checkpoint) as checkpoint:
        loss_of(model.train(), batch(0, 0))[0].backward()
    again = [call.args[0].compute.__self__ for call in checkpoint.call_args_list]
    assert len(again) == len(wanted)
    assert set(again) == wanted


@pytest.mark.parametrize("mode", [mode for mode in Recompute if mode is not Recompute.none])
def test_routers_decide_once_and_evaluation_is_left_alone(tmp_path: Path, mode: Recompute) -> None:
    config = tiny_config(tmp_path, *OVERRIDES)
    model = build_model(config.model)
    init_weights(model, 0)
    recompute_activations(model, mode)
    with patch.object(SoftmaxTopKRouter, "forward", autospec=True, side_effect=SoftmaxTopKRouter.forward) as forward:
        with patch("twohop.models.experts.grouped_linear", side_effect=grouped_linear) as product:
            loss_of(model.train(), batch(0, 0))[0].backward()
        assert forward.call_count == 2  # layers
        assert product.call_count == 2 * 2 * 2  # layers, projections, passes
        with patch("twohop.trainer.transforms.recompute.checkpoint", side_effect=AssertionError):
            loss_of(model.eval(), batch(0, 0))
            with torch.no_grad():
                loss_of(model.train(), batch(0, 0))


@pytest.mark.parametrize("mode", [mode for mode in Recompute if mode is not Recompute.none])
def test_a_pass_leaves_nothing_in_memory(tmp_path: Path, mode: Recompute) -> None:
    """Without the collector of cycles, which comes late: what a pass has kept goes with its graph."""
    config = tiny_config(tmp_path, *OVERRIDES)
    model = build_model(config.model)
    init_weights(model, 0)
    recompute_activations(model, mode)
    passes, make = [], recompute._Pass

    def note(*args: Any) -> recompute._Pass:
        made = make(*args)
        passes.append(weakref.ref(made))
        return made

    gc.disable()
    try:
        with patch.object(recompute, "_Pass", note):
            loss_of(model.train(), batch(0, 0))[0].backward()
            loss_of(model.train(), batch(0, 0))  # one that is given up
        assert passes
        assert not any(reference() for reference in passes)
    finally:
        gc.enable()


def test_losses_of_attention_are_not_left_behind_by_a_repetition(tmp_path: Path) -> None:
    settings = ["model.attention.kind=adaptive_span", "model.attention.window=8", "model.attention.span_loss=0.1"]
    config = tiny_config(tmp_path, *OVERRIDES, *settings)
    gradients = []
    for mode in Recompute:
        model = build_model(config.model)
        init_weights(model, 0)
        recompute_activations(model, mode)
        torch.manual_seed(0)
        loss_of(model.train(), batch(0, 0))[0].backward()
        assert model.attention_losses() == {}
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for ours in gradients for a, b in zip(ours, gradients[0], strict=True))


def test_an_encoder_decoder_has_the_same_gradients(tmp_path: Path) -> None:
    config = make_config(side("sentence", shared_ffn_dim=16), side("task"))
    gradients = []
    for mode in Recompute:
        model = build_model(config)
        init_weights(model, 0)
        recompute_activations(model, mode)
        output = model.train()(**inputs())
        (output.logits[is_target()].square().sum() + output.moe[0].losses.get("load_balance", 0)).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for ours in gradients for a, b in zip(ours, gradients[0], strict=True))


def test_a_cached_plan_is_followed_twice(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "model.moe.cache.enabled=true", "data.order=batches")
    told = []
    for mode in (Recompute.none, Recompute.full):
        model = build_model(config.model)
        init_weights(model, 0)
        recompute_activations(model, mode)
        for _, layer in model.moe_layers():
            assert layer.cache is not None
            layer.cache.in_use = True
        for _ in range(2):  # the second pass follows the plans of the first
            torch.manual_seed(0)
            ids_BT1 = batch(0, 0)
            output = model.train()(ids_BT1[:, :-1], sample_B=torch.arange(len(ids_BT1)))
            model.zero_grad()
            cross_entropy_sum(output.logits, ids_BT1[:, 1:]).backward()
        assert all(stats.replayed for stats in output.moe)
        told.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*told, strict=True))
