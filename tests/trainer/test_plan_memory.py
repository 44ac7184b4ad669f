"""The planner's peak of memory, by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twohop.trainer.config import Precision
from twohop.trainer.plan.holding import Holder
from twohop.trainer.plan.memory import _buckets, memory_of
from twohop.trainer.plan.passes import Passes
from twohop.trainer.plan.shape import Parameter

MIB = 2**20


def parameter_of(mib: int, layer: int = -1) -> Parameter:
    return Parameter((mib * MIB // 4,), layer=layer, block=-1, branch="", is_matrix=False)


def passes_of(made: list[int], names: list[str], layers: int = 0) -> Passes:
    """One moment before each gradient."""
    moments = np.arange(len(made))
    return Passes(
        np.array(made) * MIB, 0.0 * moments, np.zeros((len(made), layers)), moments, tuple(names), 0, (), (), ()
    )


@pytest.mark.parametrize(
    ("made", "accumulates", "expected"),
    [
        # All in MiB, of dense parameters of 20 each, whose gradients come one by one; a bucket has 32, so that each is
        # sent when the next one comes, a copy is what is sent, and a rank of four keeps a fourth. The peak comes:
        ([90, 10, 4, 8], False, (0, 90, 0)),  # before any gradient and any bucket
        ([1, 40, 4, 8], True, (20, 40, 52)),  # with the first bucket: no share yet but that of the micro-batch before
        ([1, 2, 40, 8], True, (40, 40, 52)),  # with the second, beside both shares
        ([1, 2, 4, 8], False, (20, 8, 52)),  # with the third
        ([1, 2, 4], True, (30, 4, 52)),  # the same; the last is sent after all gradients, and nothing else is left
    ],
)
def test_zero_2_sends_buckets_amid_the_pass(made: list[int], accumulates: bool, expected: tuple) -> None:
    names = [f"w{number}" for number in range(len(made))]
    shape: Any = SimpleNamespace(parameters=dict.fromkeys(names, parameter_of(20)), layers=())
    memory = memory_of(Holder(shape, "zero2", (), 4, Precision.fp32), passes_of(made, names), 1, accumulates)
    assert (memory.gradients / MIB, memory.activations / MIB, memory.buffers / MIB) == expected


def test_zero_1_has_a_bucket_from_the_first_gradient_on() -> None:
    names = ["w0", "w1"]
    shape: Any = SimpleNamespace(parameters=dict.fromkeys(names, parameter_of(1)), layers=())
    holder = Holder(shape, "zero1", (), 4, Precision.fp32)
    for made, expected in (([90, 50], (2, 90, 0)), ([90, 60], (2, 60, 32))):
        memory = memory_of(holder, passes_of(made, names), 1, False)
        assert (memory.gradients / MIB, memory.activations / MIB, memory.buffers / MIB) == expected


def test_buckets_hold_what_fits_and_are_sent_kind_by_kind() -> None:
    """Dense parameters apart from experts; one that is larger than a bucket stands beside it, with its copy."""
    sizes = {"a": (10, -1), "b": (6, 0), "c": (8, -1), "d": (5, -1), "e": (40, -1), "f": (1, -1)}
    parameters = {name: parameter_of(*size) for name, size in sizes.items()}
    shape: Any = SimpleNamespace(parameters=parameters, layers=(SimpleNamespace(num_experts=4),))
    holder = Holder(shape, "zero2", (2,), 4, Precision.fp32)  # two experts of 6 live here
    sent = list(_buckets(holder, passes_of([0] * len(sizes), list(sizes))))
    assert sent == [(3, 18 * MIB), (4, 5 * MIB), (5, 80 * MIB), (6, 1 * MIB)]


@pytest.mark.parametrize(
    ("made", "accumulates", "expected"),
    [
        # In MiB: 2 outside of blocks, 4 of block 0, 8 of block 1, whose gradients come first; a rank of four keeps a
        # fourth. The peak comes:
        ([20, 1, 1], False, (8, 20, 14)),  # with the message of block 1: its gradients, both blocks' weights
        ([1, 30, 1], False, (6, 30, 14)),  # of block 0, beside a share of block 1's and the message before
        ([1, 1, 90], False, (3, 90, 6)),  # after both, with the last message
        ([20, 1, 1], True, (14, 20, 14)),  # beside all gradients of the micro-batch before, to which those of now go
        ([1, 30, 1], True, (8, 30, 14)),
    ],
)
def test_fsdp_gathers_what_comes_next_and_sends_block_by_block(
    made: list[int], accumulates: bool, expected: tuple
) -> None:
    parameters = {
        name: Parameter((mib * MIB // 4,), layer=-1, block=block, branch="", is_matrix=False)
        for name, mib, block in (("last", 8, 1), ("first", 4, 0), ("root", 2, -1))
    }
    shape: Any = SimpleNamespace(parameters=parameters, layers=())
    holder = Holder(shape, "fsdp", (), 4, Precision.fp32)
    memory = memory_of(holder, passes_of(made, list(parameters)), 1, accumulates)
    assert (memory.gradients / MIB, memory.activations / MIB, memory.buffers / MIB) == expected


def test_masters_take_gradients_while_a_bucket_of_each_kind_is_there() -> None:
    parameters = {"a": parameter_of(20), "b": parameter_of(20), "up": parameter_of(10, 0), "down": parameter_of(10, 0)}
    shape: Any = SimpleNamespace(parameters=parameters, layers=(SimpleNamespace(num_experts=4, tokens=0, top_k=1),))
    holder = Holder(shape, "ddp", (2,), 4, Precision.bf16_params)  # two experts live here
    memory = memory_of(holder, passes_of([0] * 4, list(parameters), layers=1), 1, False)
    assert (memory.gradients / MIB, memory.buffers / MIB) == (80, 40)  # in fp32, and all of it in bf16
