"""The benchmark of a whole MoE layer: layers are right before they are timed, and the limit is the same work."""

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from twohop.comm import Topology
from twohop.models.config import Activation

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import layers
import moe_layer
import peers
import sweep

TINY = moe_layer.Shape(tokens=24, dim=16, ffn_dim=32, num_experts=4, k=2)
PAIR = (
    "twohop",
    "twohop, SwiGLU",
    "twohop, expert 0 everywhere",
    "textbook",
    "textbook, SwiGLU",
    "transformers, eager",
)


def timed() -> list[dict[str, object]]:
    topology = Topology.discover(timeout_s=20)
    shapes = {"tiny": TINY, "skewed": TINY._replace(tokens=200, skew=1.8)}
    return moe_layer.timings(topology, moe_layer.Job(shapes, PAIR, 1, 1.0))


def test_every_layer_is_measured_beside_its_limit_or_named_as_skipped() -> None:
    for measured in run_distributed(timed, 2)[0]:
        assert [row["name"] for row in measured["layers"]] == list(PAIR[:-1])
        assert list(measured["skipped"]) == ["transformers, eager"]
        assert all(row["layer_s"] > 0 and row["floor_s"] > 0 for row in measured["layers"])
        moe_layer.table(measured)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_transformers_block_is_the_same_layer(experts: str) -> None:
    pytest.importorskip("transformers")
    sizes = TINY.sizes(Activation.swiglu)
    weights, data = layers.Weights.make(sizes), moe_layer.Data.make(TINY, 0)
    block = peers.mixtral(experts)(Topology.one_process(), weights, sizes)
    expected = layers.output_and_gradient(layers.dense_layer(weights, sizes), *data)
    for actual, wanted in zip(layers.output_and_gradient(block, *data), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(topology: Topology, weights: layers.Weights, sizes: layers.Sizes) -> layers.Layer:
        right = layers.our_layer(topology, weights, sizes)
        return layers.Layer(right.module, lambda x_ND: right(x_ND) * 1.01)

    monkeypatch.setitem(moe_layer.PEERS, "wrong", peers.Peer(wrong, Activation.gelu))
    with pytest.raises(AssertionError, match="wrong: "):
        moe_layer.build("wrong", Topology.one_process(), TINY, moe_layer.Data.make(TINY, 0))


@pytest.mark.parametrize("activation", list(Activation))
def test_the_limit_is_the_arithmetic_of_the_experts(activation: Activation) -> None:
    """Three products for each of two or three matrices, of as many rows as there are assignments."""
    rows = TINY.tokens * TINY.k
    with FlopCounterMode(display=False) as counter:
        moe_layer.Floor(rows, TINY.sizes(activation)).run()
    matrices = 3 if activation is Activation.swiglu else 2
    assert counter.get_total_flops() == matrices * 3 * 2 * rows * TINY.dim * TINY.ffn_dim


def test_skew_is_what_the_shape_says() -> None:
    shape = TINY._replace(tokens=2000, num_experts=8, skew=2.5)
    weights = moe_layer.weights_of(shape, Activation.gelu, 1)
    chosen = (moe_layer.Data.make(shape, 0).x_ND @ weights.router_ED.T).topk(shape.k).indices
    counts = chosen.flatten().bincount(minlength=8)
    assert counts[0] / counts.float().mean() == pytest.approx(2.5, abs=0.02)
    assert counts.argmax() == 0


def test_the_sweep_draws_every_axis_with_its_limit(tmp_path: Path) -> None:
    times = {"layer_s": 0.2, "floor_s": 0.1, "ratio": 2.0, "tokens_per_s": 10.0}
    measured = [{"axis": axis, "value": value, **times} for axis, values in sweep.AXES.items() for value in values]
    sweep.table(measured)
    sweep.draw(measured, tmp_path / "layer.svg")
    drawn = (tmp_path / "layer.svg").read_text()
    assert drawn.count('id="axes_') == len(sweep.AXES) + 1  # and the legend's
