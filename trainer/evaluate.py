"""Validation: the mean cross-entropy of the validation split.

Shapes: N targets, V classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twohop.trainer.data import IGNORED
from twohop.trainer.setup import Run
from twohop.trainer.world import rank, sum_over_world, world_size


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean cross-entropy in nats per target over the first `eval.batches` global batches of the validation split.

    Every rank of the world must call this, and gets the same bits. Samples come in their order; the result
    does not depend on the world size. Routing is dropless unless model.moe.eval_capacity_factor is set.
    """
    config, samples = run.config, run.data.valid
    micro_size = config.train.micro_batch
    wanted = config.eval.batches * config.train.global_batch
    num_samples = min(wanted, len(samples)) if wanted else len(samples)
    micro_batches = math.ceil(num_samples / micro_size)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    for start in range(0, micro_batches, world_size()):
        index = start + rank()
        # Experts may live on other ranks, so all ranks run equally often: one without work repeats the first sample.
        own = range(index * micro_size, min((index + 1) * micro_size, num_samples))
        batch = samples.batch(own or [0]).to(run.device)
        with run.engine.autocast():
            logits = run.model(**batch.inputs).logits
        if own:
            total += cross_entropy_sum(logits, batch.targets)
    sum_over_world(total, "validation loss")
    return float(total) / samples.num_targets(range(num_samples))


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ over all targets in nats, of logits [*targets.shape, V], in fp32 (fp64 for fp64 logits); IGNORED ones are 0."""
    logits_NV = logits.flatten(0, -2)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
