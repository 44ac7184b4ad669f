"""The benchmark of one task against the whole model compares models that say the same."""

import sys
from argparse import Namespace
from pathlib import Path

import torch

from tests.distributed import run_distributed
from twohop.comm import Topology
from twohop.models import parameter_counts

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import task_extract


def both_on_this_rank() -> tuple[int, int, int]:
    """Local parameters of the whole model, those of a task, and those of the whole model together."""
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    config = task_extract.make_config(Namespace(dim=16, layers=1, experts=4, length=4))
    whole, part = task_extract.build_both(config, topology)
    task_extract.compare_logits(whole, part, topology.rank, length=4)
    sources_BS = torch.zeros(3, 4, dtype=torch.int64)
    (seconds,) = task_extract.decode(whole, sources_BS, torch.tensor([0, 1, 2]), 4)
    assert seconds > 0
    local, own = (sum(p.numel() for p in model.parameters()) for model in (whole, part))
    return local, own, parameter_counts(config).total


def test_a_task_is_compared_with_the_model_that_it_comes_from() -> None:
    for local, own, total in run_distributed(both_on_this_rank, 2):
        assert own < local < total
