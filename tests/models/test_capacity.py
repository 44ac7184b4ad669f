"""Capacity against its definition, a loop over queues, and other systems' own code."""

import deepspeed.moe.sharded_moe as deepspeed_moe
import pytest
import torch
from transformers import NllbMoeConfig, SwitchTransformersConfig
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from tests.models.reference import capacity_keeps
from twohop.models.capacity import drop_overflow, expert_capacity, fill_positions
from twohop.models.config import BatchPriority, CapacityRounding

# vmoe's published example of two tokens competing, gates [token, expert].
VMOE_GATES = torch.tensor([[0.4, 0.0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


def random_probs(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Skewed logits [N, E] and their softmax, N and E changing with the seed; a capacity that often drops."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_experts = 5 + seed % 28, (2, 4, 8)[seed % 3]
    logits = torch.randn(num_tokens, num_experts, generator=generator) + torch.randn(num_experts, generator=generator)
    return logits, logits.softmax(-1), 1 + seed % 7


@pytest.mark.parametrize(
    ("rounding", "tokens", "experts", "top_k", "factor", "expected"),
    [
        ("ceil", 10, 4, 1, 1.0, 3),
        ("ceil", 10, 1, 1, 1.1, 11),  # in floating point 1.1 · 10 > 11
        ("ceil", 100, 8, 2, 1.25, 32),
        ("round", 10, 4, 1, 1.0, 2),  # 2.5: half to even
        ("round", 14, 4, 1, 1.0, 4),  # 3.5: half to even
        ("round", 13, 4, 1, 1.0, 3),
        ("ceil4", 10, 4, 1, 1.0, 4),
        ("ceil4", 33, 4, 1, 1.0, 12),
        ("ceil4", 32, 4, 1, 1.0, 8),
        ("tutel", 10, 4, 2, 1.0, 6),  # 2 · int(ceil(2.5))
        ("tutel", 10, 4, 2, 1.25, 6),  # 2 · int(3.75)
    ],
)
def test_capacity_is_rounded_as_each_system_does(rounding, tokens, experts, top_k, factor, expected):
    assert expert_capacity(tokens, experts, top_k, factor, CapacityRounding(rounding)) == expected


def test_capacity_has_a_minimum():
    assert expert_capacity(4, 8, 1, 1.0, minimum=4) == 4
    assert expert_capacity(64, 8, 1, 1.0, minimum=4) == 8


def test_ceil_is_deepspeeds_capacity():
    for tokens in range(1, 100):
        for experts in (2, 4, 8, 16):
            for factor in (0.5, 1.0, 1.25, 2.0):
                theirs = deepspeed_moe._capacity(torch.empty(tokens, experts), torch.tensor(factor), torch.tensor(4))
                assert expert_capacity(tokens, experts, 1, factor, minimum=4) == int(theirs)


def test_vmoe_example():
    ids = VMOE_GATES.topk(2).indices
    expected = [[(0, 0), (2, 1)], [(0, 1), (2, 2)], [(2, 0), (0, 2)]]
    assert torch.stack([ids, fill_positions(ids)], -1).tolist() == [[list(pair) for pair in row] for row in expected]


def test_queues_fill_choice_by_choice():
    for seed in range(200):
        _, probs, capacity = random_probs(seed)
        weights, ids = probs.topk(min(3, probs.shape[1]))
        ids = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.1, -1)
        kept_ids, kept_weights = drop_overflow(ids, weights, capacity)
        keep = capacity_keeps(ids, capacity)
        assert torch.equal(kept_ids, torch.where(keep, ids, -1))
        assert torch.equal(kept_weights[ids >= 0], torch.where(keep, weights, 0.0)[ids >= 0])


def test_nothing_to_fill():
    ids, weights = drop_overflow(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), 4)
    assert ids.shape == weights.shape == (0, 2)


def test_vmoe_example_by_priority():
    weights, ids = VMOE_GATES.topk(2)
    kept, _ = drop_overflow(ids, weights, 2, BatchPriority.max)
    expected = [[(0, 1), (2, 2)], [(0, 0), (2, 1)], [(2, 0), (0, 2)]]
    assert kept.tolist() == [[expert if place < 2 else -1 for expert, place in row] for row in expected]


@pytest.mark.parametrize("priority", [BatchPriority.max, BatchPriority.sum])
def test_priority_is_filling_in_sorted_order(priority):
    for seed in range(200):
        _, probs, capacity = random_probs(seed)
        ids = probs.topk(min(3, probs.shape[1])).indices
        ids = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.1, -1)
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        score = max if priority is BatchPriority.max else sum
        order = sorted(range(len(ids)), key=lambda n: -score(weights[n].tolist()))
        keep = torch.empty_like(ids, dtype=torch.bool)
        keep[order] = capacity_keeps(ids[order], capacity)
        kept_ids, kept_weights = drop_overflow(ids, weights, capacity, priority)
        assert torch.equal(kept_ids, torch.where(keep, ids, -1))
        assert torch.equal(kept_weights[ids >= 0], torch.where(keep, weights, 0.0)[ids >= 0])


def test_equal_priorities_fill_in_token_order():
    ids, weights = torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1)
    for priority in BatchPriority:
        assert drop_overflow(ids, weights, 2, priority)[0].flatten().tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("priority", [BatchPriority.none, BatchPriority.max])
def test_top2_keeps_what_nllb_keeps(priority):
    for seed in range(200):
        logits, probs, capacity = random_probs(seed)
        num_experts = logits.shape[1]
        config = NllbMoeConfig(
            num_experts=num_experts,
            expert_capacity=capacity,
            hidden_size=4,
            second_expert_policy="all",
            normalize_router_prob_before_dropping=True,
            batch_prioritized_routing=priority is not BatchPriority.none,
            moe_eval_capacity_token_fraction=-1.0,
        )
        _, combine = NllbMoeTop2Router(config).route_tokens(logits.clone())
        weights, ids = probs.topk(2)
        kept_ids, _ = drop_overflow(ids, weights, capacity, priority)
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(dense(kept_ids, weights * (kept_ids >= 0), num_experts), combine)


def test_top1_keeps_what_switch_transformers_keeps():
    for seed in range(100):
        logits, probs, capacity = random_probs(seed)
        num_experts = logits.shape[1]
        config = SwitchTransformersConfig(
            num_experts=num_experts, expert_capacity=capacity, hidden_size=num_experts, router_jitter_noise=0.0
        )
        theirs = SwitchTransformersTop1Router(config).eval()
        torch.nn.init.eye_(theirs.classifier.weight)
        kept, weight, _ = theirs(logits[None])
        ids, weights = drop_overflow(*reversed(probs.topk(1)), capacity)
        torch.testing.assert_close(dense(ids, weights, num_experts), (kept * weight)[0])


def test_top2_keeps_what_deepspeed_keeps():
    for seed in range(100):
        logits, probs, _ = random_probs(seed)
        num_tokens, num_experts = logits.shape
        _, combine, _, _ = deepspeed_moe.top2gating(logits.clone(), 0.5, 1, top2_2nd_expert_sampling=False)
        capacity = expert_capacity(num_tokens, num_experts, 2, 0.5, minimum=1)
        ids, weights = drop_overflow(*reversed(probs.topk(2)), capacity)
        # DeepSpeed normalises what is left after dropping.
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        torch.testing.assert_close(dense(ids, weights, num_experts), combine.sum(-1))


def test_top1_keeps_as_many_as_deepspeed():
    """DeepSpeed picks the survivors of one expert by topk over ones, an order that nothing defines: so count them."""
    for seed in range(100):
        logits, probs, _ = random_probs(seed)
        num_tokens, num_experts = logits.shape
        for factor in (0.5, float(num_experts)):
            _, combine, _, _ = deepspeed_moe.top1gating(logits.clone(), factor, 1, use_rts=False)
            capacity = expert_capacity(num_tokens, num_experts, 1, factor, minimum=1)
            ids, weights = drop_overflow(*reversed(probs.topk(1)), capacity)
            ours, theirs = dense(ids, weights, num_experts), combine.sum(-1)
            assert torch.equal((ours > 0).sum(0), (theirs > 0).sum(0))
            if factor == num_experts:
                torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("policy", ["position", "probs"])
def test_topk_keeps_what_deepspeed_keeps_in_its_own_order(policy):
    """Its orders differ from choice-major: token by token, or by probability. As one column of single choices, queues
    fill in exactly the order in which the assignments are given."""
    for seed in range(100):
        logits, probs, _ = random_probs(seed)
        num_tokens, num_experts = logits.shape
        top_k = min(3, num_experts)
        _, combine, _, _ = deepspeed_moe.topkgating(logits.clone(), top_k, 0.5, 1, drop_policy=policy)
        capacity = expert_capacity(num_tokens, num_experts, top_k, 0.5, minimum=1)
        weights, ids = probs.topk(top_k)
        flat_ids, flat_weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
        order = flat_weights[:, 0].argsort(descending=True) if policy == "probs" else torch.arange(len(flat_ids))
        kept_ids, kept_weights = torch.empty_like(flat_ids), torch.empty_like(flat_weights)
        kept_ids[order], kept_weights[order] = drop_overflow(flat_ids[order], flat_weights[order], capacity)
        kept = dense(kept_ids.view_as(ids), kept_weights.view_as(weights), num_experts)
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).eps)
        torch.testing.assert_close(kept, combine.sum(-1))


def dense(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[N, K] ids and weights as one matrix [N, E]."""
    matrix = weights.new_zeros(len(ids), num_experts + 1)
    return matrix.scatter_add_(1, ids + 1, weights)[:, 1:]
