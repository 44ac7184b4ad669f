"""Router losses against a slow reference, transformers, DeepSpeed and vmoe's published figures."""

import deepspeed.moe.sharded_moe as deepspeed_moe
import pytest
import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.switch_transformers import modeling_switch_transformers

from tests.models import routing_reference as plain
from tests.models.routing import SEEDS, make_logits, make_router, route
from twohop.models.config import BalanceOver, RouterConfig
from twohop.models.routers import TokenInfo
from twohop.models.routers.base import count_assignments
from twohop.models.routers.losses import importance_loss, load_balance_loss, load_loss, sequence_loss, z_loss


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balance_loss_has_the_stated_scale(top_k):
    """Ours is 1 when balanced; transformers' Mixtral loss is K times it, DeepSpeed's topkgating has our scale."""
    for seed in SEEDS:
        logits = make_logits(seed)
        num_experts = logits.shape[1]
        routing = route(make_router(num_experts, top_k=top_k, load_balance_loss=0.01), logits)
        loss = routing.losses["load_balance"]
        expected = plain.balance([plain.softmax(row) for row in logits.tolist()], routing.ids_NK.tolist())
        assert loss.item() == pytest.approx(0.01 * expected, rel=1e-5)
        mixtral = modeling_mixtral.load_balancing_loss_func((logits,), num_experts, top_k)
        torch.testing.assert_close(loss * top_k, 0.01 * mixtral)
        deepspeed = deepspeed_moe.topkgating(logits.clone(), top_k, 8.0, 0)[0]
        torch.testing.assert_close(loss, 0.01 * deepspeed)
        if top_k == 1:
            probs = logits.softmax(-1)
            switch = modeling_switch_transformers.load_balancing_loss_func(probs[None], probs.argmax(-1)[None])
            torch.testing.assert_close(loss, 0.01 * switch)
            top1 = deepspeed_moe.top1gating(logits.clone(), 8.0, 0, use_rts=False)[0]
            torch.testing.assert_close(loss, 0.01 * top1)
        if top_k == 2:  # which counts first choices only
            top2 = deepspeed_moe.top2gating(logits.clone(), 8.0, 0, top2_2nd_expert_sampling=False)[0]
            first = count_assignments(logits.topk(1).indices, num_experts)
            torch.testing.assert_close(load_balance_loss(logits.softmax(-1), first), top2)


def test_topk_softmax_is_balanced_by_mixtrals_loss():
    for seed in SEEDS:
        logits = make_logits(seed)
        loss = route(make_router(logits.shape[1], name="topk_softmax"), logits).losses["load_balance"]
        torch.testing.assert_close(
            2 * loss, 0.01 * modeling_mixtral.load_balancing_loss_func((logits,), logits.shape[1], 2)
        )


def test_balanced_load_costs_one():
    probs = torch.full((16, 4), 0.25)
    torch.testing.assert_close(load_balance_loss(probs, torch.full((4,), 8)), torch.tensor(1.0))


def test_figures_that_vmoe_publishes():
    gates = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])
    assert float(importance_loss(gates.log())) == pytest.approx(0.03874999, rel=1e-6)
    first_choices = count_assignments(gates.topk(1).indices, 3)
    assert float(load_balance_loss(gates, first_choices)) == pytest.approx(1.0875)


@pytest.mark.parametrize("seed", SEEDS)
def test_importance_and_load_are_their_definitions(seed):
    logits, top_k = make_logits(seed), 1 + seed % 3
    num_experts, noise = logits.shape[1], 1.0 + seed % 2
    router = make_router(
        num_experts, name="noisy", top_k=top_k, noise=noise, importance_loss=0.5, load_loss=0.25, z_loss=0.1
    )
    torch.manual_seed(seed)
    losses = route(router, logits).losses
    torch.manual_seed(seed)
    noisy = logits + noise / num_experts * torch.randn(logits.shape)
    assert losses["importance"].item() == pytest.approx(0.5 * plain.importance(logits.tolist()), rel=1e-4)
    expected = plain.load(logits.tolist(), noisy.tolist(), noise / num_experts, top_k)
    assert losses["load"].item() == pytest.approx(0.25 * expected, rel=1e-4, abs=1e-7)
    assert losses["z"].item() == pytest.approx(0.1 * plain.z(logits.tolist()), rel=1e-4)
    quiet = route(router.eval(), logits).losses
    assert quiet["load"] == 0
    assert torch.equal(quiet["importance"], losses["importance"])


def test_defaults_of_vmoe():
    router = make_router(name="noisy")
    assert set(route(router, make_logits(1)).losses) == {"importance", "load"}
    assert (router.config.importance_loss, router.config.load_loss) == (0.005, 0.005)


@pytest.mark.parametrize("name", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_sequence_loss_is_the_balance_of_each_sequence(name):
    for seed in SEEDS:
        logits = torch.cat([make_logits(seed)[:3]] * 4) + make_logits(seed)[:1] * torch.arange(12)[:, None] / 12
        router = make_router(logits.shape[1], name=name, sequence_loss=0.1, load_balance_loss=0.0)
        routing = route(router, logits, num_sequences=3)
        scores = [plain.sigmoid(row) if name == "sigmoid" else plain.softmax(row) for row in logits.tolist()]
        probs = [[p / sum(row) for p in row] for row in scores]
        ids = routing.ids_NK.tolist()
        parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
        expected = sum(plain.balance(probs[part], ids[part]) for part in parts) / 3
        assert routing.losses["sequence"].item() == pytest.approx(0.1 * expected, rel=1e-5)
        ragged = TokenInfo(3, length_B=torch.tensor([2, 4, 6]))
        parts = [slice(0, 2), slice(2, 6), slice(6, 12)]
        expected = sum(plain.balance(probs[part], ids[part]) for part in parts) / 3
        assert router(logits, ragged).losses["sequence"].item() == pytest.approx(0.1 * expected, rel=1e-5)


def test_sigmoid_scores_are_balanced_as_shares():
    for seed in SEEDS:
        logits = make_logits(seed)
        routing = route(make_router(logits.shape[1], name="sigmoid", load_balance_loss=1.0), logits)
        scores = [plain.sigmoid(row) for row in logits.tolist()]
        expected = plain.balance([[s / sum(row) for s in row] for row in scores], routing.ids_NK.tolist())
        assert routing.losses["load_balance"].item() == pytest.approx(expected, rel=1e-5)


def test_z_loss_is_transformers():
    for seed in SEEDS:
        logits = make_logits(seed)
        expected = 1e-3 * modeling_switch_transformers.router_z_loss_func(logits[None])
        for name in ("softmax_topk", "noisy", "sinkhorn", "expert_choice"):
            router = make_router(logits.shape[1], name=name, z_loss=1e-3)
            torch.testing.assert_close(route(router, logits).losses["z"], expected)


def test_global_balance_counts_all_ranks_and_micro_batches_so_far():
    """f over the global batch, P local; the other rank is played by a function that adds its counts."""
    ours, theirs = [make_logits(1), make_logits(4)], [make_logits(7), make_logits(10)]
    num_experts = ours[0].shape[1]
    other_counts = [count_assignments(x.topk(2).indices, num_experts) for x in theirs]
    router = make_router(num_experts, load_balance_loss=1.0, load_balance_over=BalanceOver.global_batch)
    router.sum_over_ranks = lambda counts: counts.add_(remaining.pop(0))
    for _ in range(2):  # a step starts again from zero
        remaining = list(other_counts)
        seen = torch.zeros(num_experts, dtype=torch.int64)
        for x, added in zip(ours, other_counts, strict=True):
            own = count_assignments(x.topk(2).indices, num_experts)
            seen = seen + own + added
            routing = route(router, x)
            expected = load_balance_loss(x.softmax(-1), seen)
            torch.testing.assert_close(routing.losses["load_balance"], expected)
            assert torch.equal(routing.load_E, own)
        router.after_step(seen.double())
    assert not remaining
    quiet = route(router.eval(), ours[0]).losses["load_balance"]  # evaluation asks nobody
    own = count_assignments(ours[0].topk(2).indices, num_experts)
    torch.testing.assert_close(quiet, load_balance_loss(ours[0].softmax(-1), own))


def test_global_balance_of_no_loss_is_refused():
    with pytest.raises(ValueError, match=r"load_balance_over=global_batch has no use with .*load_balance_loss=0"):
        RouterConfig(load_balance_loss=0.0, load_balance_over=BalanceOver.global_batch)


def test_a_loss_of_weight_zero_is_not_there():
    assert route(make_router(load_balance_loss=0.0), make_logits(1)).losses == {}


def test_losses_of_no_tokens_are_zero():
    every = {"z_loss": 1.0, "sequence_loss": 1.0}
    for options in (every, {"name": "sigmoid", **every}, {"name": "noisy", "z_loss": 1.0}):
        routing = route(make_router(**options), torch.empty(0, 8))
        assert len(routing.losses) == 3
        assert all(loss == 0 for loss in routing.losses.values()), options


def test_gradients_of_losses():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(6, 4, dtype=torch.float64)
    ids, load = logits.topk(2).indices, torch.tensor([3, 4, 4, 1])
    for loss in (
        z_loss,
        importance_loss,
        lambda x: load_loss(x, x + noise, 0.7, 2),
        lambda x: load_balance_loss(x.softmax(-1), load),
        lambda x: sequence_loss(x.softmax(-1), ids, TokenInfo(2)),
    ):
        assert torch.autograd.gradcheck(loss, logits)
