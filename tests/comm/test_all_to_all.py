"""The bare collective: two hops equal one, forward and backward, for any split."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.distributed import run_distributed
from twohop.comm import Topology, TrafficMeter, build_all_to_all


def rows_of(rank: int, send: list[int], width: int, dtype: torch.dtype) -> torch.Tensor:
    """[R, width] rows whose values name their sender and place."""
    total = sum(send)
    return (1000 * rank + torch.arange(total * width).view(total, width)).to(dtype)


def exchange_on_this_rank(levels: tuple[int, ...], ep_size: int, cases: list[Any]) -> tuple[list[int], list[Any]]:
    """The ranks of this one's EP group, and for each case what both collectives give."""
    topology = Topology.discover(levels=levels, ep_size=ep_size, timeout_s=20)
    collectives = [build_all_to_all(name, topology) for name in ("flat", "two_level")]
    results = []
    for splits, width, dtype in cases:
        send = splits[topology.rank]
        by_name = []
        for collective in collectives:
            rows = rows_of(topology.rank, send, width, dtype)
            if not dtype.is_floating_point:
                by_name.append((*collective(rows, torch.tensor(send)), None))
                continue
            rows.requires_grad_()
            received, recv_counts = collective(rows, torch.tensor(send))
            received.backward(received.detach() * 3 + topology.rank)
            by_name.append((received.detach(), recv_counts, rows.grad))
        results.append(by_name)
    return topology.ep_ranks, results


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, list[Any]]:
    levels = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 1), (2, 3), (3, 2), (4, 2), (2, 4), (2, 2, 2)]))
    world = torch.Size(levels).numel()
    ep_size = draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    split = st.lists(st.integers(0, 5), min_size=ep_size, max_size=ep_size)
    case = st.tuples(
        st.lists(split, min_size=world, max_size=world),
        st.integers(1, 3),
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8]),
    )
    return levels, ep_size, draw(st.lists(case, min_size=12, max_size=12))


# Two nodes of three: the order of blocks on a hop is not its own inverse there.
OBLONG = ((2, 3), 6, [([[(rank + 2 * peer) % 5 for peer in range(6)] for rank in range(6)], 2, torch.float32)])


@settings(max_examples=8)  # a new world costs more than its exchanges
@example(OBLONG)
@given(exchanges())
def test_two_hops_equal_one_for_every_split(drawn: tuple[tuple[int, ...], int, list[Any]]) -> None:
    levels, ep_size, cases = drawn
    world = torch.Size(levels).numel()
    results = run_distributed(exchange_on_this_rank, world, levels, ep_size, cases)
    for i, (splits, width, dtype) in enumerate(cases):
        for rank, (group, by_case) in enumerate(results):
            me = group.index(rank)
            blocks = [rows_of(peer, splits[peer], width, dtype).split(splits[peer])[me] for peer in group]
            expected = torch.cat(blocks)
            for received, recv_counts, grad in by_case[i]:
                assert torch.equal(received, expected)
                assert recv_counts.tolist() == [splits[peer][me] for peer in group]
                if dtype.is_floating_point:
                    rows = rows_of(rank, splits[rank], width, dtype)
                    owner = torch.tensor(group).repeat_interleave(torch.tensor(splits[rank]))
                    assert torch.equal(grad, rows * 3 + owner[:, None].to(dtype))


def gradcheck_on_this_rank() -> bool:
    topology = Topology.discover(ranks_per_node=1, timeout_s=20)
    collective = build_all_to_all("two_level", topology)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    received, _ = collective(rows, torch.tensor([1, 3]))
    (grad,) = torch.autograd.grad(received.sum(), rows)
    return torch.equal(grad, torch.ones_like(rows))


def test_gradient_returns_to_the_sender() -> None:
    assert all(run_distributed(gradcheck_on_this_rank, 2))


def messages_on_this_rank(name: str) -> dict[str, Any]:
    topology = Topology.discover(ranks_per_node=4, timeout_s=20)
    meter = TrafficMeter()
    collective = build_all_to_all(name, topology, meter=meter)
    collective(torch.zeros(16, 8), torch.full((8,), 2))
    return {level: phases["all-to-all"] for level, phases in meter.snapshot().items()}


def test_two_level_sends_fewer_and_larger_messages_between_nodes() -> None:
    """2 nodes x 4 ranks: L(M-1) = 4 messages become M-1 = 1, with the same bytes; S(L-1)/L more inside."""
    row_bytes = 8 * 4
    for flat in run_distributed(messages_on_this_rank, 8, "flat"):
        assert flat == {"between nodes": (8 * row_bytes, 4), "inside node": (6 * row_bytes, 3)}
    for two_level in run_distributed(messages_on_this_rank, 8, "two_level"):
        assert two_level == {"between nodes": (8 * row_bytes, 1), "inside node": (12 * row_bytes, 3)}


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([3]), "do not add up to the 4 rows"),
        (torch.tensor([5, -1]), "send_counts must be int64 [1]"),
        (torch.tensor([4], dtype=torch.int32), "send_counts must be int64 [1]"),
    ],
)
def test_wrong_counts_are_refused_before_anything_moves(counts: torch.Tensor, message: str) -> None:
    collective = build_all_to_all("flat", Topology.discover())
    with pytest.raises(ValueError, match="rank 0: all_to_all") as error:
        collective(torch.zeros(4, 2), counts)
    assert message in str(error.value)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="use flat or two_level"):
        build_all_to_all("ring", Topology.discover())
