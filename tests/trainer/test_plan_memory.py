"""The planner's peak of memory, by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twohop.trainer.config import Precision
from twohop.trainer.plan.holding import Holder
from twohop.trainer.plan.memory import memory_of
from twohop.trainer.plan.passes import Passes
from twohop.trainer.plan.shape import Parameter

MIB = 2**20


@pytest.mark.parametrize(
    ("made", "accumulates", "expected"),
    [
        # All moments in MiB, of dense parameters of 20 each, whose gradients come one by one; a bucket has 32, a copy
        # of it is sent, and a rank of four keeps a fourth. The peak comes:
        ([50, 10, 4, 8], False, (0, 50, 32)),  # before any gradient
        (
            [1, 2, 40, 8],
            True,
            (15, 40, 64),
        ),  # when a full bucket is sent: no share yet but that of the micro-batch before
        ([1, 2, 4, 8], True, (30, 0, 60)),  # with the last 28, beside both shares
        ([1, 1, 1, 1, 10, 1, 1], False, (30, 10, 64)),  # with the second of three full buckets, beside the share
    ],
)
def test_zero_2_sends_full_buckets_amid_the_pass(made: list[int], accumulates: bool, expected: tuple) -> None:
    names = [f"w{number}" for number in range(len(made) - 1)]
    parameter = Parameter((20 * MIB // 4,), layer=-1, block=-1, branch="", is_matrix=False)
    shape: Any = SimpleNamespace(parameters=dict.fromkeys(names, parameter), layers=())
    moments = np.arange(len(made))
    ran = Passes(np.array(made) * MIB, 0.0 * moments, np.zeros((len(made), 0)), moments, tuple(names), 0, (), (), ())
    memory = memory_of(Holder(shape, "zero2", (), 4, Precision.fp32), ran, 1, accumulates)
    assert (memory.gradients / MIB, memory.activations / MIB, memory.buffers / MIB) == expected
