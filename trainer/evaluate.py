"""Validation: the mean cross-entropy of the validation split, and how often the model's first choice is right."""

import math
from typing import NamedTuple

import torch

from twohop.trainer.objective import cross_entropy_sum
from twohop.trainer.setup import Run
from twohop.trainer.world import rank, sum_over_world, world_size


class Evaluation(NamedTuple):
    """What the validation split says of a model."""

    loss: float  # mean cross-entropy in nats per target
    accuracy: float  # share of the targets that have the largest logit

    def record(self) -> dict[str, float]:
        """The same for metrics.jsonl and summary.json."""
        return {
            "valid_loss": self.loss,
            "valid_perplexity": perplexity(self.loss),
            "valid_accuracy": self.accuracy,
        }


@torch.no_grad()
def evaluate(run: Run) -> Evaluation:
    """Loss and accuracy over the first `eval.batches` global batches of the validation split.

    Every rank of the world must call this, and gets the same bits. Samples come in their order; the result
    does not depend on the world size. Routing is dropless unless model.moe.eval_capacity_factor is set.
    """
    config, samples = run.config, run.data.valid
    micro_size = config.train.micro_batch
    wanted = config.eval.batches * config.train.global_batch
    num_samples = min(wanted, len(samples)) if wanted else len(samples)
    micro_batches = math.ceil(num_samples / micro_size)
    totals = torch.zeros(2, dtype=torch.float64, device=run.device)  # cross-entropy, right choices
    run.model.eval()
    for start in range(0, micro_batches, world_size()):
        index = start + rank()
        # Experts may live on other ranks, so all ranks run equally often: one without work repeats the first sample.
        own = range(index * micro_size, min((index + 1) * micro_size, num_samples))
        batch = samples.batch(own or [0]).to(run.device)
        with run.engine.autocast():
            logits = run.model(**batch.inputs).logits
        if own:
            right = (logits.argmax(-1) == batch.targets).sum()  # never at IGNORED, which is no class
            totals += torch.stack([cross_entropy_sum(logits, batch.targets).double(), right.double()])
    sum_over_world(totals, "validation loss")
    loss, accuracy = (totals / samples.num_targets(range(num_samples))).tolist()
    return Evaluation(loss, accuracy)


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
