"""Capacity by policy: what is dropped, what is counted as slots, and what a schedule follows."""

import math
from dataclasses import replace

import pytest
import torch

from twohop.models.capacity import SMOOTHING, Capacity
from twohop.models.config import CapacityPolicy, CapacityRounding, MoEConfig, RouterConfig
from twohop.models.routers import Routing
from twohop.models.routers.base import count_assignments

E, K, N = 4, 2, 20
DYNAMIC, SCHEDULE = CapacityPolicy.dynamic, CapacityPolicy.schedule


def capacity_of(**options: object) -> Capacity:
    capacity = Capacity(MoEConfig(experts=[E], min_capacity=0, router=RouterConfig(top_k=K), **options), E)
    capacity.init_buffers()
    return capacity


def routing(seed: int, skew: float = 0.3) -> Routing:
    """Random assignments that prefer the first expert."""
    scores_NE = torch.rand(N, E, generator=torch.Generator().manual_seed(seed))
    scores_NE[:, 0] += skew
    ids_NK = scores_NE.topk(K).indices
    return Routing(ids_NK, torch.ones(N, K), {}, count_assignments(ids_NK, E))


@pytest.mark.parametrize("seed", range(5))
def test_dynamic_is_the_smallest_capacity_that_drops_nothing(seed):
    routed = routing(seed)
    filled = capacity_of(capacity_policy=DYNAMIC)(routed)
    assert torch.equal(filled.ids_NK, routed.ids_NK)
    factor = float(filled.rows) * E / (K * N)
    assert float(filled.need) == factor
    for wanted, drops in ((factor, False), (factor - E / (K * N), True)):
        static = capacity_of(capacity_factor=round(wanted, 6))(routed)
        assert bool((static.ids_NK < 0).any()) == drops


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.3, 2.0])
def test_a_bound_drops_as_the_static_factor_does_and_allocates_no_more_than_is_needed(bound):
    routed = routing(7)
    static = capacity_of(capacity_factor=bound)(routed)
    bounded = capacity_of(capacity_policy=DYNAMIC, capacity_bound=bound)(routed)
    assert torch.equal(bounded.ids_NK, static.ids_NK)
    assert torch.equal(bounded.weights_NK, static.weights_NK)
    assert int(bounded.rows) == min(math.ceil(bound * K * N / E), int(routed.load_E.max()))
    assert int(static.rows) == math.ceil(bound * K * N / E)


def test_a_schedule_follows_the_mean_need_with_a_margin():
    capacity = capacity_of(capacity_policy=SCHEDULE, capacity_margin=1.2)
    routed = routing(3, skew=5.0)  # every token goes to the first expert
    first = capacity(routed)
    assert torch.equal(first.ids_NK, routed.ids_NK)  # nothing measured yet: nothing dropped
    assert int(first.rows) == N
    capacity.after_step(1.5)
    capacity.after_step(1.0)
    average = SMOOTHING * 1.5 + (1 - SMOOTHING) * 1.0
    filled = capacity(routed)
    assert float(capacity.need) == average
    assert int(filled.rows) == math.ceil(average * 1.2 * K * N / E)
    kept = count_assignments(filled.ids_NK, E)
    assert kept.tolist() == routed.load_E.clamp(max=int(filled.rows)).tolist()
    assert int(kept[0]) == int(filled.rows) < int(routed.load_E[0])


def test_a_schedule_stays_between_the_least_capacity_and_its_bound():
    routed = routing(3)
    options = {"capacity_policy": SCHEDULE, "capacity_bound": 1.2}
    capacity = capacity_of(**options)
    assert int(capacity(routed).rows) == math.ceil(1.2 * K * N / E)
    capacity.after_step(0.1)
    capacity.config = replace(capacity.config, min_capacity=5)
    assert int(capacity(routed).rows) == 5


def test_evaluation_has_a_factor_of_its_own():
    routed = routing(1)
    for policy in CapacityPolicy:
        capacity = capacity_of(capacity_policy=policy, eval_capacity_factor=0.5).eval()
        capacity.after_step(3.0)
        assert int(capacity(routed).rows) == math.ceil(0.5 * K * N / E)
        assert torch.equal(capacity_of(capacity_policy=policy).eval()(routed).ids_NK, routed.ids_NK)


def test_no_tokens_need_no_capacity():
    nothing = Routing(torch.empty(0, K, dtype=torch.int64), torch.empty(0, K), {}, torch.zeros(E, dtype=torch.int64))
    for policy in CapacityPolicy:
        filled = capacity_of(capacity_policy=policy)(nothing)
        assert (len(filled.ids_NK), float(filled.need)) == (0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"capacity_policy": DYNAMIC, "capacity_factor": 1.0},
            r"capacity_factor=1.0 has no use with capacity_policy=dynamic: set it to null",
        ),
        ({"capacity_bound": 1.0}, r"capacity_bound=1.0 has no use with capacity_policy=static"),
        (
            {"capacity_policy": DYNAMIC, "capacity_margin": 1.5},
            r"capacity_margin=1.5 has no use with capacity_policy=dynamic: set it to 1.1",
        ),
        ({"capacity_policy": SCHEDULE, "capacity_margin": 0.0}, r"capacity_margin=0.0: use a positive factor"),
        ({"capacity_policy": SCHEDULE, "capacity_bound": -1.0}, r"capacity_bound=-1.0: use a positive factor"),
        (
            {"capacity_policy": SCHEDULE, "capacity_rounding": CapacityRounding.tutel},
            r"capacity_rounding=tutel has no use with capacity_policy=schedule",
        ),
    ],
)
def test_keys_without_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**options)
