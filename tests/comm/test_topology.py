"""Layouts of EP and EDP groups, and the impossible ones."""

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import run_distributed
from twohop.comm import Topology
from twohop.comm.topology import check_ep_size, ep_block, ep_grid, world_levels


@given(levels=st.lists(st.integers(1, 6), min_size=1, max_size=3), data=st.data())
def test_every_divisor_has_regular_groups(levels: list[int], data: st.DataObject) -> None:
    world = math.prod(levels)
    ep_size = data.draw(st.sampled_from([d for d in range(1, world + 1) if world % d == 0]))
    block = ep_block(tuple(levels), ep_size)
    assert math.prod(block) == ep_size
    grid = ep_grid(tuple(levels), block)
    assert sorted(grid.flatten().tolist()) == list(range(world))
    for group in grid.tolist():
        assert group == sorted(group)
        coordinates = [[rank // math.prod(levels[i + 1 :]) % levels[i] for rank in group] for i in range(len(levels))]
        spans = [sorted(set(along)) for along in coordinates]
        assert [len(span) for span in spans] == list(block)
        assert list(zip(*coordinates, strict=True)) == list(product(*spans))


def test_small_groups_stay_inside_a_node() -> None:
    assert ep_grid((2, 4), ep_block((2, 4), 2)).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert ep_grid((2, 4), ep_block((2, 4), 4)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ep_grid((2, 3), ep_block((2, 3), 2)).tolist() == [[0, 3], [1, 4], [2, 5]]


def groups_on_this_rank(ranks_per_node: int, ep_size: int) -> dict[str, Any]:
    topology = Topology.discover(ranks_per_node=ranks_per_node, timeout_s=20).with_ep(ep_size)
    assert topology.with_ep(ep_size) is topology
    assert topology.mesh is not None
    assert topology.mesh.get_local_rank("ep") == topology.ep_rank
    assert topology.mesh.get_local_rank("edp") == topology.edp_rank
    total = torch.tensor([float(topology.rank)])
    dist.all_reduce(total, group=topology.edp_group)
    return {
        "ep": dist.get_process_group_ranks(topology.ep_group),
        "edp": dist.get_process_group_ranks(topology.edp_group),
        "axes": [dist.get_process_group_ranks(axis.group) if axis.group else None for axis in topology.axes],
        "sum": total.item(),
        "levels": [topology.traffic_level(peer) for peer in range(topology.world_size)],
    }


def test_groups_of_two_nodes() -> None:
    results = run_distributed(groups_on_this_rank, 8, 4, 4)
    assert results[5]["ep"] == [4, 5, 6, 7]
    assert results[5]["edp"] == [1, 5]
    assert results[5]["sum"] == 6
    assert results[5]["levels"] == ["between nodes"] * 4 + ["inside node", "own rank", "inside node", "inside node"]
    whole = run_distributed(groups_on_this_rank, 8, 4, 8)
    assert whole[6]["axes"] == [[2, 6], [4, 5, 6, 7]]
    assert whole[6]["edp"] == [6]


def ragged_on_this_rank(local_sizes: list[int]) -> str:
    import os

    os.environ["LOCAL_WORLD_SIZE"] = str(local_sizes[dist.get_rank()])
    try:
        with pytest.raises(ValueError) as error:
            Topology.discover(timeout_s=5)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    return str(error.value)


def test_ragged_nodes_are_refused_on_every_rank() -> None:
    for message in run_distributed(ragged_on_this_rank, 4, [3, 3, 3, 1]):
        assert "ragged nodes: the ranks see [1, 3] ranks" in message


@pytest.mark.parametrize("ranks_per_node", [0, 3, 5])
def test_nodes_must_be_full(ranks_per_node: int) -> None:
    with pytest.raises(ValueError, match=f"ranks_per_node={ranks_per_node} does not divide the world of 4 ranks"):
        world_levels(4, ranks_per_node)


@pytest.mark.parametrize("ep_size", [0, 3, 8])
def test_ep_size_must_divide_the_world(ep_size: int) -> None:
    with pytest.raises(ValueError, match=rf"ep_size={ep_size} does not divide .* use one of \[1, 2, 4\]"):
        check_ep_size(ep_size, 4)


def test_levels_must_hold_the_world() -> None:
    with pytest.raises(ValueError, match=r"levels=\(2, 2\) hold 4 ranks, but the world has 1"):
        Topology.discover(levels=(2, 2))


def test_one_process_is_a_world() -> None:
    topology = Topology.discover()
    assert (topology.world_size, topology.ep_size, topology.num_nodes, topology.mesh) == (1, 1, 1, None)
