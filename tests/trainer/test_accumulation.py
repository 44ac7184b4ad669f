"""Accumulating gradients over micro-batches sends none of them: they are summed over ranks once a step."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from tests.tiny import tiny_config
from tests.trainer.test_engine import batch, loss_of, overrides
from twohop.comm import Topology, build_dispatcher
from twohop.models import build_model, init_weights
from twohop.trainer.engines import build_engine

REDUCTIONS = ("allreduce_", "reduce_scatter_tensor_coalesced_", "_reduce_scatter_base_", "reduce_scatter_")


class Collectives(TorchDispatchMode):
    """Counts the collectives of torch.distributed by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def reductions_on_this_rank(directory: Path, engine: str, micro_batches: int) -> tuple[list[int], int]:
    """Reductions in the passes of each micro-batch, and in the step."""
    config = tiny_config(directory, f"engine.name={engine}", *overrides("1.0"))
    topology = Topology.discover()
    model = build_model(config.model, lambda i, n: build_dispatcher("flat", topology.with_ep([1, 2][i]), n))
    init_weights(model, 0)
    built = build_engine(model, config)
    counts = []
    for index in range(micro_batches):
        with Collectives() as collectives:
            built.backward(loss_of(built.model, batch(0, index)), index == micro_batches - 1)
        counts.append(sum(collectives.seen[name] for name in REDUCTIONS))
    with Collectives() as collectives:
        built.step(1.0)
    return counts, sum(collectives.seen[name] for name in REDUCTIONS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradients_travel_once_a_step(tmp_path: Path, engine: str) -> None:
    tiny_config(tmp_path)
    (once, in_step), _ = run_distributed(reductions_on_this_rank, 2, tmp_path, engine, 1)
    for counts, in_this_step in run_distributed(reductions_on_this_rank, 2, tmp_path, engine, 3):
        assert counts == [0, 0, *once]
        assert in_this_step == in_step
    assert sum(once) + in_step > 1  # more than the gradient norm
