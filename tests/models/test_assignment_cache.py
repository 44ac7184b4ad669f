"""The assignment cache of a layer: when it is used, and that following a plan is to the bit what routing is."""

import pytest
import torch

from tests.models.test_moe import DIM, FFN, randomise
from twohop.comm import Topology, build_dispatcher
from twohop.models.assignment_cache import SMOOTHING, AssignmentCache
from twohop.models.config import AssignmentCacheConfig, ModelConfig, MoEConfig, RouterConfig
from twohop.models.moe import MoELayer, MoEStats
from twohop.models.routers import TokenInfo

E, B, T = 6, 3, 5


def make_layer(**cache: object) -> MoELayer:
    moe = MoEConfig(experts=[E], capacity_factor=1.0, router=RouterConfig(top_k=2, z_loss=1e-3, load_balance_loss=0.1))
    moe.cache = AssignmentCacheConfig(enabled=True, **cache)
    config = ModelConfig(dim=DIM, num_layers=2, num_heads=2, ffn_dim=FFN, moe=moe)
    layer = MoELayer(config, build_dispatcher("flat", Topology.one_process(), E, chunks=2))
    randomise(layer)
    return layer


def batch(number: int) -> tuple[torch.Tensor, TokenInfo]:
    x_BTD = torch.randn(B, T, DIM, generator=torch.Generator().manual_seed(number))
    return x_BTD, TokenInfo(B, sample_B=torch.arange(number * B, number * B + B))


def step(layer: MoELayer, number: int) -> MoEStats:
    """One step of one micro-batch, with nothing learnt."""
    _, stats = layer(*batch(number))
    layer.after_step(stats, 1)
    return stats


def walk(layer: MoELayer, number: int) -> tuple[dict[str, torch.Tensor], MoEStats]:
    """Output, and the gradients that it has by itself."""
    x_BTD, about = batch(number)
    y_BTD, stats = layer(x_BTD.requires_grad_(), about)
    layer.zero_grad()
    y_BTD.backward(torch.linspace(-1, 1, y_BTD.numel()).view_as(y_BTD))
    assert x_BTD.grad is not None
    experts = {name: p.grad for name, p in layer.experts.named_parameters()}
    return {"y": y_BTD.detach(), "x": x_BTD.grad, **experts}, stats


def fill(layer: MoELayer) -> None:
    """Until both batches are followed."""
    assert layer.cache
    for number in (0, 1, 0, 1, 0, 1):
        step(layer, number)
    assert layer.cache.in_use


def test_following_a_plan_is_to_the_bit_what_routing_is_but_for_the_router(monkeypatch):
    layer = make_layer(trigger=0.1, check_every=1000)
    fill(layer)
    assert layer.cache
    replayed, stats = walk(layer, 0)
    assert stats.replayed == 1
    assert stats.losses == {}
    assert layer.router.gate.weight.grad is None
    monkeypatch.setattr(layer, "cache", None)
    routed, live = walk(layer, 0)
    assert live.replayed == 0
    assert set(live.losses) == {"load_balance", "z"}
    for key in ("y", "up", "down"):
        assert torch.equal(replayed[key], routed[key]), key
    for key in ("load_E", "dropped", "rows", "need"):
        assert torch.equal(getattr(stats, key), getattr(live, key)), key
    assert live.dropped > 0
    # Beyond the experts, the input's gradient has a part through the gate, which a plan leaves out.
    assert not torch.equal(replayed["x"], routed["x"])
    monkeypatch.setattr(layer.router.gate, "forward", lambda x_ND: (x_ND @ layer.router.gate.weight.T).detach())
    assert torch.equal(replayed["x"], walk(layer, 0)[0]["x"])


def test_the_agreement_is_a_moving_average_of_what_repeats():
    layer = make_layer(trigger=0.9)
    assert layer.cache
    first = step(layer, 0)
    assert (int(first.repeated), int(first.compared)) == (0, 0)
    assert layer.cache.agreement == 0
    again = step(layer, 0)
    assert int(again.repeated) == int(again.compared) == B * T * 2
    assert layer.cache.agreement == pytest.approx(1 - SMOOTHING)
    with torch.no_grad():
        layer.router.gate.weight.neg_()  # the most wanted become the least wanted
    turned = step(layer, 0)
    assert 0 <= int(turned.repeated) < int(turned.compared) / 2
    share = int(turned.repeated) / int(turned.compared)
    assert layer.cache.agreement == pytest.approx(SMOOTHING * (1 - SMOOTHING) + (1 - SMOOTHING) * share)


def test_only_what_came_before_is_compared():
    """A micro-batch of one known and two new samples; the order of a token's experts is not its assignment."""
    cache: AssignmentCache[None] = AssignmentCache(AssignmentCacheConfig(enabled=True), E)
    about = TokenInfo(2)
    assert cache.compare((4, 7), about, torch.tensor([[0, 1], [2, 3], [4, 5], [-1, 1]])).compared == 0
    repeated, compared = cache.compare((7, 8), about, torch.tensor([[5, 4], [1, 2], [0, 1], [0, 1]]))
    assert (int(repeated), int(compared)) == (3, 4)
    lengths = TokenInfo(2, length_B=torch.tensor([2, 1]))
    repeated, compared = cache.compare((7, 9), lengths, torch.tensor([[5, 4], [1, 0], [2, 3]]))
    assert (int(repeated), int(compared)) == (3, 4)


def test_the_trigger_the_checks_and_the_return():
    layer = make_layer(trigger=0.15, check_every=3)
    cache = layer.cache
    assert cache
    states = [(cache.in_use, bool(step(layer, 0).replayed)) for _ in range(9)]
    # Seen first, 0.1, above 0.15: in use, planned, followed, followed, every third step a check.
    assert states[:4] == [(False, False), (False, False), (False, False), (True, False)]
    assert states[4:] == [(True, True), (True, False), (True, True), (True, True), (True, False)]
    with torch.no_grad():
        layer.router.gate.weight.neg_()
    after = [bool(step(layer, 0).replayed) for _ in range(6)]
    assert after[:3] == [True, True, False]  # blind to the turn until the check
    assert cache.in_use  # 0.15 · 0.9 + … is still above the trigger
    cache.after_step(0, 100)
    cache.agreement = 0.0
    cache.after_step(0, 100)
    assert not cache.in_use
    assert not step(layer, 0).replayed


def test_new_micro_batches_are_routed_live_and_plans_are_bounded():
    layer = make_layer(trigger=0.05, check_every=1000, max_plans=2)
    for number in (0, 0, 0, 1, 2, 0, 1, 2):
        stats = step(layer, number)
    assert not stats.replayed  # the third
    assert step(layer, 0).replayed
    assert step(layer, 1).replayed
    x_BTD, about = batch(0)
    other = about._replace(sample_B=about.sample_B.flip(0))  # the same samples as another micro-batch
    assert not layer(x_BTD, other)[1].replayed


def test_evaluation_routes_live():
    layer = make_layer(trigger=0.1, check_every=1000)
    fill(layer)
    assert not layer.eval()(*batch(0))[1].replayed
    layer(batch(0)[0])  # and needs no numbers
    with pytest.raises(ValueError, match="the data does not number its samples"):
        layer.train()(batch(0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger": 0.8}, r"cache.trigger=0.8 has no use with model.moe.cache.enabled=false"),
        ({"enabled": True, "trigger": 1.1}, r"cache.trigger=1.1: use a fraction"),
        ({"enabled": True, "check_every": 1}, r"cache.check_every=1: use 2 steps or more"),
        ({"enabled": True, "max_plans": 0}, r"cache.max_plans=0: use 1 or more"),
    ],
)
def test_keys_without_use_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AssignmentCacheConfig(**options)
