"""Validation: the mean cross-entropy of the validation split, and how often the model's first choice is right."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from twohop.models import Transformer
from twohop.models.early_exit import Exits, early_exit
from twohop.trainer.data import IGNORED, Batch
from twohop.trainer.objective import cross_entropy_sum
from twohop.trainer.setup import Run
from twohop.trainer.world import rank, sum_over_world, world_size


class Evaluation(NamedTuple):
    """What the validation split says of a model."""

    loss: float  # mean cross-entropy in nats per target
    accuracy: float  # share of the targets that have the largest logit
    depth: float | None = None  # blocks that a target's state went through, where tokens may leave early
    loss_by_group: dict[str, float] | None = None  # of data with tasks or several corpora: `loss`, for each of them
    grouped_by: str = "task"  # or "corpus"

    def record(self) -> dict[str, Any]:
        """The same for metrics.jsonl and summary.json."""
        record = {
            "valid_loss": self.loss,
            "valid_perplexity": perplexity(self.loss),
            "valid_accuracy": self.accuracy,
        }
        others = {"valid_depth": self.depth, f"valid_loss_by_{self.grouped_by}": self.loss_by_group}
        return record | {name: value for name, value in others.items() if value is not None}


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Loss and accuracy over the first `eval.batches` global batches of the validation split.

    Every rank of the world must call this, and gets the same bits. Samples come in their order; the result
    does not depend on the world size. Routing is dropless unless model.moe.eval_capacity_factor is set; tokens leave
    early if eval.exit_confidence is.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=run.device)  # cross-entropy, right choices, blocks passed
    by_group = _GroupLosses(run)
    run.model.eval()
    with _exits(run) as exits:
        for batch, counts in validation_batches(run):
            with run.engine.autocast():
                logits = run.model(**batch.inputs).logits
            if counts:
                right = (logits.argmax(-1) == batch.targets).sum()  # never at IGNORED, which is no class
                depth = exits.depth_BT[batch.targets != IGNORED].sum() if exits else torch.zeros_like(right)
                sums = (cross_entropy_sum(logits, batch.targets), right, depth)
                totals += torch.stack([x.double() for x in sums])
                by_group.add(logits, batch)
    sum_over_world(totals, "validation loss")
    loss, accuracy, depth = (totals / run.data.valid.num_targets(range(_num_samples(run)))).tolist()
    return Evaluation(loss, accuracy, depth if exits else None, by_group.reduce(), run.data.grouped_by)


class _GroupLosses:
    """The mean cross-entropy of each task or corpus; nothing where the data has none."""

    def __init__(self, run: Run) -> None:
        self.names = run.data.groups
        self.totals_2S = torch.zeros(2, len(self.names), dtype=torch.float64, device=run.device)  # losses, targets

    def add(self, logits: torch.Tensor, batch: Batch) -> None:
        """Count a batch."""
        for group in range(len(self.names)):
            assert batch.group_B is not None
            own_B = (batch.group_B == group).to(logits.device)
            sums = cross_entropy_sum(logits[own_B], batch.targets[own_B]), (batch.targets[own_B] != IGNORED).sum()
            self.totals_2S[:, group] += torch.stack([x.double() for x in sums])

    def reduce(self) -> dict[str, float] | None:
        """{name: loss} over all ranks; a group without targets is left out. Every rank calls this."""
        if not self.names:
            return None
        sum_over_world(self.totals_2S, "validation losses of groups")
        pairs = zip(self.names, *self.totals_2S.tolist(), strict=True)
        return {name: loss / targets for name, loss, targets in pairs if targets}


def validation_batches(run: Run) -> Iterator[tuple[Batch, bool]]:
    """This rank's micro-batches of the validation split, on the device, and whether they count.

    Experts may live on other ranks, so all ranks get equally many: one without work gets the first sample once more.
    """
    micro_size, num_samples = run.config.train.micro_batch, _num_samples(run)
    for start in range(0, math.ceil(num_samples / micro_size), world_size()):
        first = (start + rank()) * micro_size
        own = range(first, min(first + micro_size, num_samples))
        yield run.data.valid.batch(own or [0]).to(run.device), bool(own)


def _num_samples(run: Run) -> int:
    wanted, there = run.config.eval.batches * run.config.train.global_batch, len(run.data.valid)
    return min(wanted, there) if wanted else there


def _exits(run: Run) -> AbstractContextManager[Exits | None]:
    confidence = run.config.eval.exit_confidence
    if confidence is None:
        return nullcontext()
    assert isinstance(run.model, Transformer)
    return early_exit(run.model, confidence)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
