"""Routers against a slow reference and against other systems' own code, on hundreds of random inputs."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from tests.models import routing_reference as plain
from tests.models.routing import SEEDS, make_logits, make_router, route
from twohop.models.config import BalanceOver, RouterConfig
from twohop.models.routers import ROUTERS, Routing, TokenInfo, build_router
from twohop.models.routers.base import count_assignments
from twohop.models.routers.sinkhorn import log_sinkhorn


def assert_routes(routing: Routing, ids: list[list[int]], weights: list[list[float]], num_experts: int) -> None:
    assert routing.ids_NK.tolist() == ids
    torch.testing.assert_close(routing.weights_NK, torch.tensor(weights), rtol=1e-5, atol=1e-7)
    assert routing.load_E.tolist() == [sum(row.count(e) for row in ids) for e in range(num_experts)]
    assert routing.load_E.dtype == routing.ids_NK.dtype == torch.int64


@pytest.mark.parametrize("seed", SEEDS)
def test_routers_by_token_are_their_definitions(seed):
    """Experts, their order and weights: softmax top-k, top-k softmax, switch, noisy without noise, sigmoid."""
    x = make_logits(seed)
    num_experts, top_k, renormalize = x.shape[1], 1 + seed % 4, seed % 2 == 0
    groups, bias = (1, 2, 4)[seed % 3], torch.randn(num_experts, generator=torch.Generator().manual_seed(seed)) / 10
    top_groups = min(groups, max(1 + seed % groups, -(-top_k * groups // num_experts)))

    options = {"top_k": top_k, "renormalize": renormalize}
    sigmoid_options = {"groups": groups, "top_groups": top_groups, "scale": 2.5}
    sigmoid = make_router(num_experts, name="sigmoid", **options, **sigmoid_options)
    sigmoid.bias.copy_(bias)
    cases = [
        (make_router(num_experts, **options), lambda row: plain.softmax_topk(row, top_k, renormalize)),
        (make_router(num_experts, name="topk_softmax", top_k=top_k), lambda row: plain.topk_softmax(row, top_k)),
        (make_router(num_experts, name="switch", top_k=1), lambda row: plain.softmax_topk(row, 1, False)),
        (
            make_router(num_experts, name="noisy", top_k=top_k).eval(),
            lambda row: plain.softmax_topk(row, top_k, False),
        ),
        (
            sigmoid,
            lambda row: plain.deepseek(row, bias.tolist(), top_k, groups, top_groups, renormalize, 2.5),
        ),
    ]
    for router, reference in cases:
        ids, weights = zip(*(reference(row) for row in x.tolist()), strict=True)
        assert_routes(route(router, x), list(ids), list(weights), num_experts)


@pytest.mark.parametrize("theirs", [MixtralTopKRouter, Qwen3MoeTopKRouter, OlmoeTopKRouter, DeepseekV3TopkRouter])
def test_routers_are_those_of_transformers(theirs):
    for seed in SEEDS:
        x, top_k, renormalize = make_logits(seed), 1 + seed % 3, seed % 2 == 0
        if theirs is DeepseekV3TopkRouter:  # which takes the two best of a group
            x = torch.cat([x, x.flip(0)], 1)
        num_experts = x.shape[1]
        ours = {
            MixtralTopKRouter: {"name": "topk_softmax"},
            DeepseekV3TopkRouter: {
                "name": "sigmoid", "renormalize": renormalize, "scale": 2.5, "groups": 4, "top_groups": 2
            },
        }  # fmt: skip
        router = make_router(num_experts, top_k=top_k, **ours.get(theirs, {"renormalize": renormalize}))
        sizes = dict.fromkeys(("num_local_experts", "num_experts", "hidden_size"), num_experts)
        other = theirs(
            SimpleNamespace(
                **sizes, num_experts_per_tok=top_k, norm_topk_prob=renormalize, routed_scaling_factor=2.5,
                n_group=4, topk_group=2,
            )
        )  # fmt: skip
        torch.nn.init.eye_(other.weight)
        if theirs is DeepseekV3TopkRouter:
            other.e_score_correction_bias.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
            router.bias.copy_(other.e_score_correction_bias)
        _, weights, ids = other(x)
        routing = route(router, x)
        if theirs is not DeepseekV3TopkRouter:  # whose choices are in no order
            assert torch.equal(routing.ids_NK, ids)
        dense = torch.zeros_like(x).scatter(1, ids, weights)
        torch.testing.assert_close(torch.zeros_like(x).scatter(1, routing.ids_NK, routing.weights_NK), dense)


def test_noise_decides_and_is_of_training_alone():
    for seed in SEEDS:
        x = make_logits(seed)
        num_experts = x.shape[1]
        router = make_router(num_experts, name="noisy", top_k=2, noise=3.0)
        torch.manual_seed(seed)
        routing = route(router, x)
        torch.manual_seed(seed)
        noisy = x + 3.0 / num_experts * torch.randn(x.shape)
        weights, ids = noisy.softmax(-1).topk(2)
        assert torch.equal(routing.ids_NK, ids)
        torch.testing.assert_close(routing.weights_NK, weights)
        assert torch.equal(route(router.eval(), x).ids_NK, x.topk(2).indices)


def test_jitter_is_noise_of_the_input_and_of_training_alone():
    x = make_logits(1)
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
def test_expert_choice_is_its_definition(top_k):
    for seed in SEEDS:
        x = make_logits(seed)
        routing = route(make_router(x.shape[1], name="expert_choice", top_k=top_k), x)
        for n, expected in enumerate(plain.expert_choice(x.tolist(), top_k)):
            found = [(e, w) for e, w in zip(*(t[n].tolist() for t in routing[:2]), strict=True) if e >= 0]
            assert dict(found) == pytest.approx(expected, rel=1e-5)
            assert [w for _, w in found] == sorted((w for _, w in found), reverse=True)
            assert routing.ids_NK[n, len(found) :].eq(-1).all()
            assert routing.weights_NK[n, len(found) :].eq(0).all()
        assert len(set(routing.load_E.tolist())) == 1


def test_sinkhorn_is_its_definition():
    for seed in SEEDS:
        x = make_logits(seed, torch.float64)
        expected = torch.tensor(plain.sinkhorn(x.tolist(), 5), dtype=torch.float64)
        torch.testing.assert_close(log_sinkhorn(x, 5).exp(), expected, rtol=1e-9, atol=0)
        top_k = 1 + seed % 2
        router = make_router(x.shape[1], name="sinkhorn", top_k=top_k, iterations=5).double()
        routing = route(router, x)
        assert torch.equal(routing.ids_NK, expected.topk(top_k).indices)
        scores = x.sigmoid() if top_k == 1 else x.softmax(-1)
        torch.testing.assert_close(routing.weights_NK, scores.gather(1, routing.ids_NK))
        assert torch.equal(route(router.eval(), x).ids_NK, x.topk(top_k).indices)


def test_sinkhorn_balances_and_sharp_logits_give_the_best_balanced_assignment():
    """BASE's assignment: the largest sum of logits with equally many tokens for every expert, found here by trial."""
    balanced = torch.tensor([ids for ids in product(range(3), repeat=6) if all(ids.count(e) == 2 for e in range(3))])
    for seed in range(30):
        logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        scaled = log_sinkhorn(logits, 300).exp()
        torch.testing.assert_close(scaled.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64))
        torch.testing.assert_close(scaled.sum(1), torch.full((6,), 1 / 6, dtype=torch.float64))
        sums, order = logits[torch.arange(6), balanced].sum(1).sort(descending=True)
        if sums[0] - sums[1] > 0.1:  # far from a tie, at which entropy decides
            router = make_router(3, name="sinkhorn", top_k=1, iterations=1000).double()
            routing = route(router, 100 * logits)
            assert torch.equal(routing.ids_NK[:, 0], balanced[order[0]])


def test_hash_is_a_balanced_table_that_the_seed_decides():
    router = build_router(RouterConfig(name="hash", top_k=1), 4, 8, vocab_size=50)
    router.init_buffers(torch.Generator().manual_seed(1))
    counts = router.table_V.bincount(minlength=8)
    assert counts.max() - counts.min() <= 1
    tokens = torch.arange(50).view(2, 25)
    routing = router(torch.randn(50, 4), TokenInfo(2, token_BT=tokens))
    assert torch.equal(routing.ids_NK[:, 0], router.table_V)
    assert (routing.weights_NK == 1).all()
    assert torch.equal(routing.load_E, counts)
    other = build_router(RouterConfig(name="hash", top_k=1), 4, 8, vocab_size=50)
    other.init_buffers(torch.Generator().manual_seed(1))
    assert torch.equal(other.table_V, router.table_V)
    other.init_buffers(torch.Generator().manual_seed(2))
    assert not torch.equal(other.table_V, router.table_V)
    with pytest.raises(ValueError, match=r"top_k=2: the hash router knows 1 expert"):
        build_router(RouterConfig(name="hash", top_k=2), 4, 8, vocab_size=50)
    with pytest.raises(ValueError, match=r"router.name=hash: this model's inputs are no tokens"):
        router(torch.randn(50, 4), TokenInfo(2))


@pytest.mark.parametrize("lengths", [None, [3, 1, 4]], ids=["equal lengths", "ragged"])
def test_task_and_sentence_route_whole_sequences(lengths):
    generator = torch.Generator().manual_seed(0)
    sizes = lengths or [4, 4, 4]
    x = torch.randn(sum(sizes), 6, generator=generator)
    tasks = torch.tensor([1, 0, 1])
    about = TokenInfo(3, task_B=tasks, length_B=None if lengths is None else torch.tensor(lengths))
    task = build_router(RouterConfig(name="task", renormalize=True), 6, 8, num_tasks=2)
    sentence = build_router(RouterConfig(name="sentence"), 6, 8)
    for router in (task, sentence):
        torch.nn.init.normal_(router.gate.weight, generator=generator)
    of_tasks, of_sentences = task(x, about), sentence(x, about)
    start = 0
    for sequence, size in enumerate(sizes):
        tokens, start = slice(start, start + size), start + size
        by_task = plain.softmax_topk(task.gate.weight[:, tasks[sequence]].tolist(), 2, True)
        by_mean = plain.softmax_topk((sentence.gate.weight @ x[tokens].mean(0)).tolist(), 2, False)
        for routing, (ids, weights) in ((of_tasks, by_task), (of_sentences, by_mean)):
            assert routing.ids_NK[tokens].tolist() == [ids] * size
            torch.testing.assert_close(routing.weights_NK[tokens], torch.tensor([weights] * size))
    with pytest.raises(ValueError, match=r"router.name=task: this model or its data knows no tasks"):
        task(x, TokenInfo(3))


def test_bias_moves_towards_the_experts_with_less_load():
    router = make_router(4, name="sigmoid", bias_rate=0.01)
    router.init_buffers(torch.Generator())
    router.after_step(torch.tensor([10.0, 2.0, 4.0, 4.0], dtype=torch.float64))
    assert router.bias.tolist() == pytest.approx([-0.01, 0.01, 0.01, 0.01])
    router.after_step(torch.tensor([5.0, 5.0, 6.0, 4.0], dtype=torch.float64))
    assert router.bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.02])
    assert "bias" in router.state_dict()
    assert "bias" not in dict(router.named_parameters())


def test_bias_alone_balances_a_skewed_router():
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 8)
    router = make_router(8, name="sigmoid", bias_rate=0.005)
    violations = []
    for _ in range(150):
        load = route(router, x).load_E.double()
        violations.append(float(load.max() / load.mean() - 1))
        router.after_step(load)
    assert violations[0] > 1
    assert violations[-1] < 0.15


@settings(max_examples=200)
@given(st.data())
def test_tokens_use_no_more_than_their_groups(data):
    groups, size = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.integers(1, 4))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    router = make_router(groups * size, name="sigmoid", groups=groups, top_groups=top_groups, top_k=top_k)
    router.bias.normal_(std=data.draw(st.sampled_from([0.0, 1.0, 100.0])))
    ids = route(router, torch.randn(32, groups * size)).ids_NK
    assert all(len(row.unique()) == top_k for row in ids)
    assert all(len((row // size).unique()) <= top_groups for row in ids)


@pytest.mark.parametrize("name", ["softmax_topk", "topk_softmax", "switch", "noisy", "sigmoid", "expert_choice",
                                  "sinkhorn", "sentence"])  # fmt: skip
def test_routing_ignores_autocast_and_keeps_fp64(name):
    router = make_router(name=name, top_k=1 if name == "switch" else 2, z_loss=1e-3).eval()
    x = make_logits(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route(router, x)
    plainly = route(router, x)
    assert torch.equal(under_autocast.ids_NK, plainly.ids_NK)
    assert torch.equal(under_autocast.weights_NK, plainly.weights_NK)
    assert route(router, x.bfloat16()).weights_NK.dtype == torch.float32
    router.double()
    routing = route(router, x.double())
    assert routing.weights_NK.dtype == routing.losses["z"].dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda x: route(router, x).weights_NK, make_logits(1, torch.float64)[:6].requires_grad_()
    )


def test_count_assignments_skips_empty_places():
    ids = torch.tensor([[0, 3], [-1, 3], [3, -1]])
    assert count_assignments(ids, 5).tolist() == [1, 0, 0, 3, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "magic"}, r"router.name='magic' is not a router: use one of softmax_topk, topk_softmax, switch"),
        ({"name": "switch", "top_k": 2}, r"top_k=2: the switch router"),
        ({"name": "switch", "top_k": 1, "renormalize": True}, r"renormalize=true"),
        ({"name": "hash", "top_k": 1, "z_loss": 1.0}, r"z_loss=1.0: the hash router has no such option; leave it out"),
        ({"name": "noisy", "load_balance_loss": 0.02}, r"load_balance_loss=0.02: the noisy router has no such option"),
        ({"name": "noisy", "renormalize": True}, r"renormalize=true: the noisy router has no such option"),
        ({"name": "expert_choice", "sequence_loss": 1.0}, r"sequence_loss=1.0: the expert_choice router has no"),
        ({"load_balance_over": BalanceOver.global_batch, "name": "sinkhorn"}, r"over=global_batch: the sinkhorn"),
        ({"importance_loss": 0.1}, r"importance_loss=0.1: the softmax_topk router has no such option"),
        ({"name": "topk_softmax", "noise": 2.0}, r"noise=2.0: the topk_softmax router"),
        ({"name": "sigmoid", "groups": 3}, r"groups=3 does not divide the 8 experts"),
        ({"name": "sigmoid", "groups": 8, "top_k": 2}, r"top_groups=1 of groups=8 leave a token 1 of 8 experts"),
        ({"name": "task"}, r"model.num_tasks=null: the task router needs it"),
    ],
)
def test_impossible_routers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_router(**options)


def test_what_a_router_lacks_may_be_off():
    for name in ROUTERS:
        off = RouterConfig(name=name, top_k=1, load_balance_loss=0.0, importance_loss=0.0, load_loss=0.0, bias_rate=0.0)
        build_router(off, 4, 4, vocab_size=10, num_tasks=2)
