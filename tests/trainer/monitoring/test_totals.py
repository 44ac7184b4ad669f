"""What a step says of its MoE layers, against scipy and against the layer's own routing."""

import math
from typing import Any

import pytest
import torch
from scipy import stats

from tests.distributed import run_distributed
from twohop.models import ModelConfig, build_model, init_weights
from twohop.models.config import MoEConfig, RouterConfig
from twohop.models.moe import MoEStats
from twohop.trainer.monitoring.totals import StepTotals
from twohop.trainer.world import rank


def stats_of(load_E: list[int], top_weight: float = 0.0, tokens: int = 0) -> MoEStats:
    zero = torch.tensor(0)
    return MoEStats(
        losses={}, load_E=torch.tensor(load_E), dropped=zero, rows=zero, need=zero.double(), repeated=zero,
        compared=zero, replayed=zero, tokens=torch.tensor(tokens), top_weight=torch.tensor(top_weight).double(),
    )  # fmt: skip


def record_of(*micro_batches: MoEStats) -> dict[str, float | None]:
    totals = StepTotals(["layer"])
    for micro_batch in micro_batches:
        totals.add({"loss": torch.tensor(1.0)}, (micro_batch,))
    return totals.reduce(1)["moe"]["layer"]


def step_of_two_ranks() -> tuple[dict[str, Any], int]:
    """Micro-batch n of 1 … 4, two on each rank, has n of everything."""
    totals = StepTotals(["layer"])
    for n in (2 * rank() + 1, 2 * rank() + 2):
        of_n = torch.tensor(n)
        stats = MoEStats(
            losses={}, load_E=torch.tensor([n, 3]), dropped=of_n, rows=torch.tensor([5, 9, 7, 3][n - 1]),
            need=of_n.double(), repeated=of_n, compared=2 * of_n, replayed=torch.tensor(int(n == 3)), tokens=10 * of_n,
            top_weight=n * torch.tensor(7.0),
        )  # fmt: skip
        totals.add({"loss": torch.tensor(1.0 * n), "z": torch.tensor(2.0 * n)}, (stats,))
    return totals.reduce(8), totals.micro_batches


def test_a_step_is_that_of_all_micro_batches_of_all_ranks() -> None:
    layer = {
        "load": [10 / 22, 12 / 22], "dropped": 10 / 22, "capacity": 2 * 9 * 4 / 22, "slots": 2 * 9 * 4,
        "entropy": pytest.approx(stats.entropy([10, 12], base=2)), "max_violation": pytest.approx(12 / 11 - 1),
        "dead": 0, "confidence": pytest.approx(0.7), "repeated": 0.5, "replayed": 0.25,
    }  # fmt: skip
    expected = {"loss": 10 / 8, "z": 20 / 8, "moe": {"layer": layer}}, 4
    assert run_distributed(step_of_two_ranks, 2) == [expected] * 2


@pytest.mark.parametrize("load", [[4, 4, 4, 4], [7, 0, 2, 1], [0, 0, 9, 0], [5], [0, 3]])
def test_balance_of_a_load(load: list[int]) -> None:
    record = record_of(stats_of(load), stats_of(load))
    assert record["entropy"] == pytest.approx(stats.entropy(load, base=len(load)) if len(load) > 1 else 1.0)
    assert record["max_violation"] == pytest.approx((max(load) - sum(load) / len(load)) / (sum(load) / len(load)))
    assert record["dead"] == sum(n == 0 for n in load)


def test_a_layer_that_was_left_out_has_no_balance() -> None:
    record = record_of(stats_of([0, 0]))
    assert [record[key] for key in ("entropy", "max_violation", "dead", "confidence")] == [None] * 4


def test_confidence_is_the_mean_of_the_largest_weights_over_all_tokens() -> None:
    assert record_of(stats_of([1, 2], 1.5, 3), stats_of([1, 0], 0.5, 1))["confidence"] == 0.5
    moe = MoEConfig(experts=[4], router=RouterConfig(name="softmax_topk", top_k=2), capacity_factor=0.5)
    model = build_model(ModelConfig(dim=16, num_layers=2, num_heads=2, ffn_dim=32, vocab_size=11, moe=moe))
    init_weights(model, 0)
    routings = []
    ((_, layer),) = model.moe_layers()
    layer.router.register_forward_hook(lambda module, args, routing: routings.append(routing))
    totals = StepTotals(["layer"])
    for length in (5, 8):
        output = model(torch.arange(length)[None])
        totals.add({"loss": torch.tensor(1.0)}, output.moe)
    largest = torch.cat([routing.weights_NK.max(dim=1).values for routing in routings]).double()
    confidence = totals.reduce(1)["moe"]["layer"]["confidence"]
    assert confidence == pytest.approx(largest.mean().item(), rel=1e-12)  # dropped or not: what the router thought
    assert 1 / 4 < confidence < 1
    assert len(largest) == 13
    assert math.isfinite(confidence)
