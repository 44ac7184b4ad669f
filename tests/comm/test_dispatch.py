"""Dispatch against a dense sum over experts, and the algorithms against each other to the bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.comm.reference import make_case, reference, run_layer
from tests.distributed import run_distributed
from twohop.comm import CommError, NotFiniteError, Topology, build_dispatcher
from twohop.comm.topology import ep_block, ep_grid

ALGORITHMS = ("flat", "hierarchical", "dedup")


def layers_on_this_rank(
    levels: tuple[int, ...], ep_size: int, cases: list[Any], num_experts: int, chunks: int = 1
) -> list[Any]:
    """For each case and algorithm what `run_layer` returns."""
    topology = Topology.discover(levels=levels, ep_size=ep_size, timeout_s=20)
    return [
        {name: run_layer(topology, name, case, num_experts, chunks=chunks) for name in ALGORITHMS} for case in cases
    ]


def check(levels: tuple[int, ...], ep_size: int, cases: list[Any], num_experts: int, chunks: int = 1) -> None:
    """All algorithms agree to the bit, and with the reference to a bound on rounding."""
    world = torch.Size(levels).numel()
    results = run_distributed(layers_on_this_rank, world, levels, ep_size, cases, num_experts, chunks)
    for i, case in enumerate(cases):
        expected = reference(case, num_experts)
        per_rank = num_experts // ep_size
        grad_experts = torch.zeros_like(expected["experts"])
        for rank in range(world):
            by_name = results[rank][i]
            for key in ("y", "x", "weights", "experts", "rows") if chunks == 1 else ("y", "x", "weights", "experts"):
                for name in ALGORITHMS:
                    assert torch.equal(by_name["flat"][key], by_name[name][key]), (name, key, rank)
            flat = by_name["flat"]
            for key in ("y", "x", "weights"):
                close(flat[key], expected[key][rank])
            ep_rank = ep_rank_of(levels, ep_size, rank)
            grad_experts[ep_rank * per_rank : (ep_rank + 1) * per_rank] += flat["experts"]
        close(grad_experts, expected["experts"])


def ep_rank_of(levels: tuple[int, ...], ep_size: int, rank: int) -> int:
    """EP rank of a world rank, by brute force over the grid."""
    return int((ep_grid(levels, ep_block(levels, ep_size)) == rank).nonzero()[0, 1])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums of at most some hundred terms of size about 1: a few hundred roundings."""
    bound = 300 * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("levels", "ep_size"),
    [((1, 2), 2), ((2, 1), 2), ((2, 2), 4), ((2, 2), 2), ((2, 2), 1), ((2, 3), 2), ((2, 4), 8), ((2, 4), 4),
     ((4, 2), 8), ((3, 2), 6), ((2, 2, 2), 8), ((2, 2, 2), 4)],
)  # fmt: skip
def test_all_algorithms_equal_the_reference(levels: tuple[int, ...], ep_size: int) -> None:
    world = torch.Size(levels).numel()
    experts = 2 * ep_size if ep_size > 1 else 4
    sizes = [(5 * rank + 3) % 11 for rank in range(world)]
    cases = [
        make_case(0, sizes, 3 if experts > 2 else 2, experts, 6, torch.float64),
        make_case(1, sizes, 2, experts, 5, torch.float32, "drop"),
        make_case(2, [0] * (world - 1) + [9], 2, experts, 6, torch.float64, "skewed"),
        make_case(3, sizes, 1, experts, 6, torch.float32, "one"),
        make_case(4, [0] * world, 2, experts, 6, torch.float32),
    ]
    check(levels, ep_size, cases, experts)


@settings(max_examples=6)  # a new world costs more than its layers
@given(data=st.data())
def test_random_layers(data: st.DataObject) -> None:
    levels = data.draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2)]))
    world = torch.Size(levels).numel()
    ep_size = data.draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    experts = ep_size * data.draw(st.integers(1, 4))
    k = data.draw(st.integers(1, min(4, experts)))
    chunks = data.draw(st.sampled_from([1, 1, 2, 3, 7]))
    cases = []
    for _ in range(8):
        tokens = data.draw(st.lists(st.integers(0, 12), min_size=world, max_size=world))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        routing = data.draw(st.sampled_from(["uniform", "one", "drop", "skewed"]))
        cases.append(make_case(data.draw(st.integers(0, 10**6)), tokens, k, experts, 5, dtype, routing))
    check(levels, ep_size, cases, experts, chunks)


def test_rows_stand_by_expert_then_home_rank_then_token() -> None:
    experts, world = 4, 4
    case = make_case(5, [6, 3, 5, 4], 2, experts, 3, torch.float32, "drop")
    results = run_distributed(layers_on_this_rank, world, (2, 2), 4, [case], experts)
    for rank in range(world):
        expected = [x_ND[(ids_NK == rank).any(1)] for x_ND, ids_NK, _, _ in case]
        assert torch.equal(results[rank][0]["dedup"]["rows"], torch.cat(expected))


def bytes_on_this_rank(case: list[Any], num_experts: int) -> dict[str, Any]:
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    return {name: run_layer(topology, name, case, num_experts)["traffic"] for name in ALGORITHMS}


def test_traffic_is_what_the_routing_needs() -> None:
    """Payload between nodes: one row for each (token, rank) with flat, one for each (token, node) with dedup."""
    experts, world, per_node, d = 8, 4, 2, 16
    case = make_case(6, [40, 30, 20, 10], 4, experts, d, torch.float32)
    results = run_distributed(bytes_on_this_rank, world, case, experts)
    row_bytes = 4 * d
    for rank, (_, ids_NK, _, _) in enumerate(case):
        ranks_of = [{int(e) // 2 for e in ids} for ids in ids_NK]
        nodes_of = [{r // per_node for r in ranks} for ranks in ranks_of]
        node = rank // per_node
        to_ranks = sum(r // per_node != node for ranks in ranks_of for r in ranks)
        to_nodes = sum(m != node for nodes in nodes_of for m in nodes)
        for phase in ("dispatch", "combine backward"):
            assert results[rank]["flat"]["between nodes"][phase] == (to_ranks * row_bytes, 2)
            assert results[rank]["dedup"]["between nodes"][phase] == (to_nodes * row_bytes, 1)
    for phase in ("dispatch", "combine", "combine backward", "dispatch backward"):
        total = {
            name: sum(results[rank][name]["between nodes"][phase][0] for rank in range(world)) for name in ALGORITHMS
        }
        assert total["hierarchical"] == total["flat"] > total["dedup"]


def mismatch_on_this_rank(kind: str) -> str:
    topology = Topology.discover(ranks_per_node=2, timeout_s=5)
    dispatcher = build_dispatcher("dedup", topology, 4, label="layer 3")
    d = 8 if topology.rank == 3 and kind == "shape" else 4
    dtype = torch.float64 if topology.rank == 3 and kind == "dtype" else torch.float32
    ids_NK, weights_NK = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(CommError) as error:
        dispatcher.dispatch(torch.ones(2, d, dtype=dtype), ids_NK, weights_NK)
    return str(error.value)


@pytest.mark.parametrize("kind", ["shape", "dtype"])
def test_ranks_that_disagree_are_named(kind: str) -> None:
    messages = run_distributed(mismatch_on_this_rank, 4, kind)
    for rank in range(3):  # rank 2 hears it from rank 3 itself, rank 0 by hearsay on the second hop
        assert f"rank {rank}, layer 3, counts: ranks [3] are in trouble or disagree" in messages[rank]
    assert "rank 3, layer 3, counts: ranks [" in messages[3]


def nan_on_this_rank() -> str:
    topology = Topology.discover(ranks_per_node=2, timeout_s=5)
    dispatcher = build_dispatcher("dedup", topology, 4, label="layer 1")
    x_ND = torch.ones(2, 4)
    if topology.rank == 2:
        x_ND[1, 3] = float("nan")
    with pytest.raises(NotFiniteError) as error:
        dispatcher.dispatch(x_ND, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    return str(error.value)


def test_rows_that_are_not_finite_are_found_before_they_spread() -> None:
    for rank, message in enumerate(run_distributed(nan_on_this_rank, 4)):
        assert f"rank {rank}, layer 1" in message
        assert "rank 2 was given rows that are not finite" in message  # rank 1 knows by hearsay


def test_one_process_needs_no_group() -> None:
    topology = Topology.discover()
    case = make_case(8, [7], 2, 4, 5, torch.float64, "drop")
    expected, actual = reference(case, 4), run_layer(topology, "flat", case, 4)
    for key in ("y", "x", "weights"):
        close(actual[key], expected[key][0])
    close(actual["experts"], expected["experts"])


def test_second_derivatives_are_refused() -> None:
    dispatcher = build_dispatcher("flat", Topology.discover(), 2)
    x_ND = torch.randn(3, 4, requires_grad=True)
    dispatched = dispatcher.dispatch(x_ND, torch.tensor([[0], [1], [1]]), torch.ones(3, 1))
    (grad,) = torch.autograd.grad(dispatched.rows.square().sum(), x_ND, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_unknown_name_and_uneven_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown dispatcher 'tree': use one of flat, hierarchical, dedup"):
        build_dispatcher("tree", Topology.discover(), 4)


def uneven_on_this_rank() -> str:
    topology = Topology.discover(timeout_s=5)
    with pytest.raises(ValueError) as error:
        build_dispatcher("flat", topology, 3)
    return str(error.value)


def test_experts_must_divide_among_ranks() -> None:
    assert "3 experts cannot be shared by 2" in run_distributed(uneven_on_this_rank, 2)[0]
