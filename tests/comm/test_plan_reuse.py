"""A kept plan carries what a fresh one carries, to the bit, without counts; who follows another one is named."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.reference import all_experts, expert_weights, make_case
from tests.distributed import run_distributed
from twohop.comm import CommError, Planned, TokenDispatcher, Topology, TrafficMeter, build_dispatcher

EXPERTS, D, K = 8, 5, 3
NAMES = ("y", "x", "experts")


def walk(
    dispatcher: TokenDispatcher, planned: Planned, x_ND: torch.Tensor, grad_ND: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Output and gradients of one layer that follows a plan."""
    x_ND = x_ND.clone().requires_grad_()
    local = slice(dispatcher.first_expert, dispatcher.first_expert + dispatcher.num_local_experts)
    w_EDD = expert_weights(EXPERTS, D, x_ND.dtype)[local].clone().requires_grad_()
    y_ND, beside = dispatcher.follow(
        planned, x_ND, lambda rows, counts: all_experts(rows, counts, w_EDD), beside=lambda: "beside"
    )
    assert beside == "beside"
    y_ND.backward(grad_ND)
    assert x_ND.grad is not None
    assert w_EDD.grad is not None
    return {"y": y_ND.detach(), "x": x_ND.grad, "experts": w_EDD.grad}


def reuse_on_this_rank(name: str, chunks: int, first: Any, then: Any) -> list[Any]:
    """The layer on other tokens than the plan was made with: planned anew, and twice with the kept plan."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    meter = TrafficMeter()
    dispatcher = build_dispatcher(name, topology, EXPERTS, chunks=chunks, label="layer 0", meter=meter)
    x_ND, ids_NK, weights_NK, grad_ND = first[topology.rank]
    kept = dispatcher.plan(x_ND, ids_NK, weights_NK.clone().requires_grad_()).kept()
    results = []
    for planned in (dispatcher.plan(x_ND, ids_NK, weights_NK.clone().requires_grad_()), kept, kept):
        meter.reset()
        results.append(walk(dispatcher, planned, then[topology.rank][0], grad_ND) | {"traffic": meter.snapshot()})
    return results


@pytest.mark.parametrize(("name", "chunks"), [("flat", 1), ("dedup", 1), ("dedup", 3)])
def test_a_kept_plan_gives_the_same_bits(name: str, chunks: int) -> None:
    sizes = [7, 0, 12, 5]
    first = make_case(0, sizes, K, EXPERTS, D, torch.float32, "drop")
    then = make_case(1, sizes, K, EXPERTS, D, torch.float32)
    for fresh, once, twice in run_distributed(reuse_on_this_rank, 4, name, chunks, first, then):
        for key in NAMES:
            assert torch.equal(fresh[key], once[key]), key
            assert torch.equal(fresh[key], twice[key]), key
        # Rows travel as before; of the metadata nothing does, not even the gradients of weights.
        for level, phases in fresh["traffic"].items():
            rows = {phase: sent for phase, sent in phases.items() if "metadata" not in phase}
            assert once["traffic"][level] == twice["traffic"][level] == rows
            assert not {"counts", "metadata"} & set(once["traffic"][level])


def test_a_kept_plan_needs_no_group_and_holds_no_graph() -> None:
    dispatcher = build_dispatcher("flat", Topology.one_process(), EXPERTS)
    x_ND, ids_NK, weights_NK, grad_ND = make_case(2, [9], K, EXPERTS, D, torch.float64)[0]
    planned = dispatcher.plan(x_ND, ids_NK, weights_NK.requires_grad_())
    fresh, again = (walk(dispatcher, plan, x_ND, grad_ND) for plan in (planned, planned.kept()))
    assert all(torch.equal(fresh[key], again[key]) for key in NAMES)
    assert weights_NK.grad is not None
    assert not planned.kept().plan.weight_n.requires_grad
    with pytest.raises(ValueError, match=r"the plan is for tokens \[9, 5\] torch.float64, not \[9, 5\] torch.float32"):
        dispatcher.follow(planned.kept(), x_ND.float(), lambda rows, counts: rows)


def astray_on_this_rank(kind: str) -> str:
    """All ranks follow the plan of one batch, rank 2 does something else; routing has the same sizes everywhere."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=2)
    dispatcher = build_dispatcher("dedup", topology, EXPERTS, label="layer 1")
    x_ND = torch.ones(4, D)
    ids_NK = torch.arange(4)[:, None] * 2
    one, other = (dispatcher.plan(x_ND, ids.contiguous(), torch.ones(4, 1)).kept() for ids in (ids_NK, ids_NK + 1))
    dispatcher.follow(one, x_ND, lambda rows, counts: rows)

    def go_on() -> None:
        if dist.get_rank() != 2:
            dispatcher.follow(one, x_ND, lambda rows, counts: rows)
        elif kind == "another plan":
            dispatcher.follow(other, x_ND, lambda rows, counts: rows)
        elif kind == "routes live":
            dispatcher.run(x_ND, ids_NK, torch.ones(4, 1), lambda rows, counts: rows)
        else:
            dispatcher.follow(one, x_ND[:3], lambda rows, counts: rows)

    with pytest.raises((CommError, ValueError)) as error:
        go_on()
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("another plan", "rank 2 came to layer 1, plan 2 again, dispatch"),
        ("routes live", "rank 2 came to layer 1, counts"),
        ("other tokens", "rank 2 stopped: layer 1, dispatch: ValueError: the plan is for tokens [4, 5]"),
    ],
)
def test_a_rank_that_does_not_follow_is_named(kind: str, words: str) -> None:
    messages = run_distributed(astray_on_this_rank, 4, kind)
    for rank, message in enumerate(messages):
        if rank != 2:
            assert message.startswith(f"rank {rank}, layer 1, plan 1 again, ")
            assert words in message
