"""Training with attention that adds a loss and parameters of its own, on several ranks."""

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.end_to_end.runs import records
from tests.tiny import write_corpus

# A large weight, so that a span loss which is counted once too often or too seldom moves the gradient norm.
SPAN = ["model.attention.kind=adaptive_span", "model.attention.window=12", "model.attention.ramp=4",
        "model.attention.span_loss=0.5", "train.steps=4", "optim.lr=0.02"]  # fmt: skip


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_span_loss_does_not_depend_on_ranks_or_engine(tmp_path: Path, engine: str) -> None:
    write_corpus(tmp_path)
    (expected,) = run_distributed(records, 1, tmp_path, SPAN, init=False)
    spans = [record["aux_loss"] for record in expected]
    assert spans[0] < spans[1]  # they start at nothing
    for ours in run_distributed(records, 2, tmp_path, [*SPAN, f"engine.name={engine}"], init=False):
        for key in ("loss", "aux_loss", "grad_norm"):
            assert [record[key] for record in ours] == pytest.approx([record[key] for record in expected], rel=1e-4)
