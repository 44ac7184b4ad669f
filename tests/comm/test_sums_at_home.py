"""Sums at home: the same layer, whose bits know nothing of where experts live."""

from typing import Any

import pytest
import torch

from tests.comm.reference import expert_weights, make_case, reference, run_layer
from tests.comm.test_dispatch import ALGORITHMS, close
from tests.distributed import run_distributed
from twohop.comm import CommError, Topology, build_dispatcher

EXPERTS, D, WORLD = 8, 6, 4
SLOTS_E = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])  # where experts live after a move


def layers_on_this_rank(cases: list[Any], chunks: int, sums_at_home: bool = True) -> list[dict[str, Any]]:
    """Of each case the layer by each algorithm."""
    topology = Topology.discover(levels=(2, 2), timeout_s=20)
    options: dict[str, Any] = {"chunks": chunks, "sums_at_home": sums_at_home}
    return [{name: run_layer(topology, name, case, EXPERTS, **options) for name in ALGORITHMS} for case in cases]


@pytest.mark.parametrize("chunks", [1, 3])
def test_all_algorithms_equal_the_reference(chunks: int) -> None:
    sizes = [5, 0, 9, 3]
    cases = [
        make_case(0, sizes, 3, EXPERTS, D, torch.float64),
        make_case(1, sizes, 4, EXPERTS, D, torch.float32, "drop"),
        make_case(2, [0, 0, 0, 9], 2, EXPERTS, D, torch.float64, "skewed"),
        make_case(3, [0] * WORLD, 2, EXPERTS, D, torch.float32),
    ]
    results = run_distributed(layers_on_this_rank, WORLD, cases, chunks)
    for i, case in enumerate(cases):
        expected = reference(case, EXPERTS)
        grads = [of_rank[i]["flat"]["experts"] for of_rank in results]
        close(torch.cat(grads), expected["experts"])
        for rank, of_rank in enumerate(results):
            for key in ("y", "x", "weights"):
                close(of_rank[i]["flat"][key], expected[key][rank])
            for name in ALGORITHMS:
                for key in ("y", "x", "weights", "experts"):
                    assert torch.equal(of_rank[i][name][key], of_rank[i]["flat"][key]), (name, key, rank)


def moved(case: list[Any]) -> list[Any]:
    """The same case, with every expert's number where it lives after the move."""
    return [(x_ND, torch.where(ids_NK < 0, -1, SLOTS_E[ids_NK]), *rest) for x_ND, ids_NK, *rest in case]


def moved_layers_on_this_rank(case: list[Any], sums_at_home: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The layer, and the layer with experts that have moved, weights and all."""
    topology = Topology.discover(levels=(2, 2), timeout_s=20)
    options: dict[str, Any] = {"sums_at_home": sums_at_home}
    still = run_layer(topology, "dedup", case, EXPERTS, **options)
    expert_of_slot = SLOTS_E.argsort()
    weights_EDD = expert_weights(EXPERTS, D, torch.float32)[expert_of_slot]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.comm.reference.expert_weights", lambda *_: weights_EDD)
        return still, run_layer(topology, "dedup", moved(case), EXPERTS, **options)


@pytest.mark.parametrize("sums_at_home", [True, False])
def test_moved_experts_change_no_bit_and_on_the_way_they_would(sums_at_home: bool) -> None:
    case = make_case(4, [40, 30, 0, 50], 4, EXPERTS, D, torch.float32, "drop")
    results = run_distributed(moved_layers_on_this_rank, WORLD, case, sums_at_home)
    grads = [torch.cat([of_rank[i]["experts"] for of_rank in results]) for i in (0, 1)]
    assert torch.equal(grads[0], grads[1][SLOTS_E])
    for still, other in results:
        assert torch.equal(still["weights"], other["weights"])
    same = [torch.equal(still[key], other[key]) for still, other in results for key in ("y", "x")]
    assert all(same) if sums_at_home else not all(same)


def test_a_row_travels_for_every_assignment() -> None:
    case = make_case(5, [20, 10, 30, 5], 4, EXPERTS, D, torch.float32, "drop")
    for rank, of_rank in enumerate(run_distributed(layers_on_this_rank, WORLD, [case], 1)):
        ids_NK = case[rank][1]
        elsewhere = (ids_NK >= 0) & (ids_NK // 4 != rank // 2)  # 4 experts of a node
        for name in ALGORITHMS:
            for phase in ("dispatch", "combine backward"):
                sent, _ = of_rank[0][name]["traffic"]["between nodes"][phase]
                if name != "hierarchical":  # which has others' rows to carry as well
                    assert sent == int(elsewhere.sum()) * 4 * D, (name, phase)
            assert "metadata backward" not in of_rank[0][name]["traffic"]["between nodes"]  # weights stay at home


def test_a_kept_plan_keeps_the_weights() -> None:
    dispatcher = build_dispatcher("flat", Topology.one_process(), EXPERTS, sums_at_home=True)
    x_ND, ids_NK, weights_NK, _ = make_case(6, [9], 3, EXPERTS, D, torch.float64, "drop")[0]
    planned = dispatcher.plan(x_ND, ids_NK, weights_NK.requires_grad_())

    def experts(rows_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return rows_RD * torch.arange(1.0, EXPERTS + 1).repeat_interleave(torch.tensor(counts))[:, None]

    fresh, again = (dispatcher.follow(plan, x_ND, experts)[0] for plan in (planned, planned.kept()))
    factor_NK = torch.where(ids_NK < 0, 0, ids_NK + 1) * weights_NK
    torch.testing.assert_close(fresh, x_ND * factor_NK.sum(1, keepdim=True))
    assert torch.equal(fresh, again)
    assert fresh.requires_grad
    assert not again.requires_grad
    for other_ND in (x_ND[:5], torch.cat([x_ND, x_ND])):
        with pytest.raises(ValueError, match=f"the plan is for 9 tokens, not {len(other_ND)}"):
            dispatcher.follow(planned.kept(), other_ND, experts)


def misfit_on_this_rank() -> str:
    topology = Topology.discover(timeout_s=5)
    dispatcher = build_dispatcher("flat", topology, EXPERTS, label="layer 2", sums_at_home=True)
    ids_NK, weights_NK = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3 if topology.rank else 2)
    with pytest.raises((CommError, ValueError)) as error:
        dispatcher.plan(torch.ones(2, D), ids_NK, weights_NK)
    return str(error.value)


def test_arguments_that_do_not_fit_are_told_to_all() -> None:
    own, heard = run_distributed(misfit_on_this_rank, 2)
    assert "dispatch takes tokens float [N, D], ids int64 [N, K], weights float [N, K]" in own
    assert "rank 0 stopped: layer 2, dispatch: ValueError: dispatch takes tokens float [N, D]" in heard
