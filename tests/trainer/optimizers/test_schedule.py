"""Learning rates, against torch's schedulers and at the points that define them."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from twohop.trainer.config import DecayShape, ScheduleConfig
from twohop.trainer.optimizers.schedule import lr_factor


@pytest.mark.parametrize(("warmup", "total"), [(1, 10), (5, 40), (20, 300)])
def test_cosine_agrees_with_torch(warmup: int, total: int) -> None:
    config = ScheduleConfig(warmup_steps=warmup, final_fraction=0.1)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedulers = [
        LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(1, warmup - 1)),
        CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=0.1),
    ]
    scheduler = SequentialLR(optimizer, schedulers, milestones=[warmup - 1])
    for step in range(total):
        assert lr_factor(step, total, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()


def test_wsd_warms_up_stays_and_decays_linearly() -> None:
    config = ScheduleConfig(DecayShape.wsd, warmup_steps=4, decay_fraction=0.25, final_fraction=0.2)
    factors = [lr_factor(step, 20, config) for step in range(20)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:15] == [1.0] * 11
    assert factors[15:] == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2])


@pytest.mark.parametrize("shape", list(DecayShape))
def test_edges(shape: DecayShape) -> None:
    assert lr_factor(0, 1, ScheduleConfig(shape, warmup_steps=0, decay_fraction=1.0, final_fraction=0.3)) == 0.3
    assert lr_factor(9, 10, ScheduleConfig(shape, warmup_steps=20)) == 0.5  # a run that ends in its warm-up
    assert lr_factor(9, 10, ScheduleConfig(shape, warmup_steps=10)) == 1.0


def test_wsd_without_decay_stays_at_the_peak() -> None:
    config = ScheduleConfig(DecayShape.wsd, warmup_steps=0, decay_fraction=0.0)
    assert {lr_factor(step, 10, config) for step in range(10)} == {1.0}


def test_wsd_does_not_decay_before_the_warm_up_is_over() -> None:
    config = ScheduleConfig(shape=DecayShape.wsd, warmup_steps=6, decay_fraction=0.5, final_fraction=0.0)
    factors = [lr_factor(step, 10, config) for step in range(10)]
    assert factors[5:] == pytest.approx([1, 0.75, 0.5, 0.25, 0])  # four steps are left for the decay, not five
