"""Routers and their losses against transformers and DeepSpeed."""

import deepspeed.moe.sharded_moe as deepspeed_moe
import pytest
import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.switch_transformers import modeling_switch_transformers

from twohop.models.config import RouterConfig
from twohop.models.routers import Routing, TokenInfo, build_router
from twohop.models.routers.base import count_assignments
from twohop.models.routers.losses import load_balance_loss, z_loss

DIM = 12


def make_router(num_experts: int = 8, seed: int = 0, **options) -> torch.nn.Module:
    router = build_router(RouterConfig(**options), DIM, num_experts)
    torch.nn.init.normal_(router.gate.weight, generator=torch.Generator().manual_seed(seed))
    return router


def route(router: torch.nn.Module, x: torch.Tensor) -> Routing:
    return router(x, TokenInfo(num_sequences=1))


def make_tokens(seed: int, num_tokens: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_topk_is_its_definition(top_k, renormalize):
    for seed in range(20):
        router, x = make_router(seed=seed, top_k=top_k, renormalize=renormalize), make_tokens(seed)
        routing = route(router, x)
        probs = torch.nn.functional.softmax(x @ router.gate.weight.T, -1)
        order = probs.argsort(-1, descending=True)[:, :top_k]
        weights = probs.gather(1, order)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        assert torch.equal(routing.ids_NK, order)
        torch.testing.assert_close(routing.weights_NK, weights)
        assert routing.load_E.tolist() == [(order == e).sum().item() for e in range(8)]


def test_renormalised_weights_are_mixtrals_softmax_of_the_selected_logits():
    router, x = make_router(top_k=2, renormalize=True), make_tokens(1)
    top_logits = (x @ router.gate.weight.T).topk(2).values
    torch.testing.assert_close(route(router, x).weights_NK, top_logits.softmax(-1))


def test_switch_keeps_the_probability_as_weight():
    router, x = make_router(name="switch", top_k=1), make_tokens(2)
    routing = route(router, x)
    torch.testing.assert_close(routing.weights_NK[:, 0], (x @ router.gate.weight.T).softmax(-1).amax(-1))


def test_jitter_is_noise_of_the_input_and_of_training_alone():
    x = make_tokens(3)
    router = make_router(name="switch", top_k=1, jitter=0.01)
    torch.manual_seed(5)
    noisy = route(router, x)
    torch.manual_seed(5)
    noise = torch.empty_like(x).uniform_(0.99, 1.01)
    quiet = route(router.eval(), x * noise)
    assert torch.equal(noisy.weights_NK, quiet.weights_NK)
    assert not torch.equal(noisy.weights_NK, route(router, x).weights_NK)
    assert torch.equal(route(router, x).weights_NK, route(make_router(name="switch", top_k=1), x).weights_NK)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balance_loss_has_the_stated_scale(top_k):
    """Ours is 1 when balanced; transformers' Mixtral loss is K times it, DeepSpeed's topkgating has our scale."""
    for seed in range(50):
        router, x = make_router(seed=seed, top_k=top_k, load_balance_loss=0.01), make_tokens(seed)
        logits = x @ router.gate.weight.T
        loss = route(router, x).losses["load_balance"]
        mixtral = modeling_mixtral.load_balancing_loss_func((logits,), 8, top_k)
        torch.testing.assert_close(loss * top_k, 0.01 * mixtral)
        deepspeed = deepspeed_moe.topkgating(logits.clone(), top_k, 8.0, 0)[0]
        torch.testing.assert_close(loss, 0.01 * deepspeed)
        if top_k == 1:
            probs = logits.softmax(-1)
            switch = modeling_switch_transformers.load_balancing_loss_func(probs[None], probs.argmax(-1)[None])
            torch.testing.assert_close(loss, 0.01 * switch)


def test_balanced_load_costs_one():
    probs = torch.full((16, 4), 0.25)
    torch.testing.assert_close(load_balance_loss(probs, torch.full((4,), 8)), torch.tensor(1.0))


def test_z_loss_is_transformers():
    for seed in range(50):
        router, x = make_router(seed=seed, z_loss=1e-3), make_tokens(seed)
        logits = x @ router.gate.weight.T
        expected = 1e-3 * modeling_switch_transformers.router_z_loss_func(logits[None])
        torch.testing.assert_close(route(router, x).losses["z"], expected)


def test_a_loss_of_weight_zero_is_not_there():
    assert route(make_router(load_balance_loss=0.0), make_tokens(0)).losses == {}


def test_losses_of_no_tokens_are_zero():
    routing = route(make_router(z_loss=1.0), make_tokens(0, num_tokens=0))
    assert {name: loss.item() for name, loss in routing.losses.items()} == {"load_balance": 0.0, "z": 0.0}


def test_routing_ignores_autocast_and_keeps_fp64():
    router, x = make_router(z_loss=1e-3), make_tokens(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route(router, x)
    plain = route(router, x)
    assert torch.equal(under_autocast.ids_NK, plain.ids_NK)
    assert torch.equal(under_autocast.weights_NK, plain.weights_NK)
    assert under_autocast.weights_NK.dtype == torch.float32
    assert route(router, x.bfloat16()).weights_NK.dtype == torch.float32
    router.double()
    assert torch.autograd.gradcheck(
        lambda x: route(router, x).weights_NK, make_tokens(5, 6, torch.float64).requires_grad_()
    )
    assert route(router, x.double()).losses["z"].dtype == torch.float64


def test_count_assignments_skips_empty_places():
    ids = torch.tensor([[0, 3], [-1, 3], [3, -1]])
    assert count_assignments(ids, 5).tolist() == [1, 0, 0, 3, 0]


def test_z_loss_pulls_logits_down():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(z_loss, logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "magic"}, r"router.name='magic' is not a router: use one of softmax_topk, topk_softmax, switch"),
        ({"name": "switch", "top_k": 2}, r"top_k=2: the switch router"),
        ({"name": "switch", "top_k": 1, "renormalize": True}, r"renormalize=true"),
    ],
)
def test_impossible_routers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)
