"""Rows of experts that move between the ranks of an EP group."""

import pytest
import torch

from tests.distributed import run_distributed
from twohop.comm import Topology
from twohop.comm.move import move_rows


def permutations(experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(experts, generator=generator), torch.randperm(experts, generator=generator)


def rows_after_moves(experts: int, ep_size: int) -> bool:
    """Whether experts are where they should be after a move, and another one back."""
    topology = Topology.discover(ranks_per_node=2, ep_size=ep_size)
    of_rank = experts // ep_size
    own = slice(topology.ep_rank * of_rank, (topology.ep_rank + 1) * of_rank)
    before_E, after_E = permutations(experts)
    numbers = torch.arange(experts).view(-1, 1, 1).expand(-1, 2, 3).float()  # a row is full of its expert's number
    local = numbers[before_E.argsort()][own]
    moved = move_rows(local, before_E, after_E, topology)
    back = move_rows(moved, after_E, before_E, topology)
    return torch.equal(moved, numbers[after_E.argsort()][own]) and torch.equal(back, local)


@pytest.mark.parametrize(("experts", "ep_size"), [(8, 4), (12, 2), (4, 4), (6, 1)])
def test_rows_move_to_their_slots(experts: int, ep_size: int) -> None:
    assert all(run_distributed(rows_after_moves, 4, experts, ep_size, timeout=180))
