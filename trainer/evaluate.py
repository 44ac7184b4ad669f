"""Validation: the mean cross-entropy of the validation split.

Shapes: B sequences, T positions, T1 = T + 1, N tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from twohop.trainer.setup import Run
from twohop.trainer.world import rank, sum_over_world, world_size


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean cross-entropy in nats per token over the first `eval.batches` global batches of the validation split.

    Every rank of the world must call this, and gets the same bits. Windows come in the order of the text; the result
    does not depend on the world size. Routing is dropless unless model.moe.eval_capacity_factor is set.
    """
    config, windows = run.config, run.data.valid
    micro_size = config.train.micro_batch
    wanted = config.eval.batches * config.train.global_batch
    num_windows = min(wanted, len(windows)) if wanted else len(windows)
    micro_batches = math.ceil(num_windows / micro_size)
    total = torch.zeros((), dtype=torch.float64, device=run.device)
    run.model.eval()
    for start in range(0, micro_batches, world_size()):
        index = start + rank()
        # Experts may live on other ranks, so all ranks run equally often: one without work repeats the first window.
        own = range(index * micro_size, min((index + 1) * micro_size, num_windows))
        ids_BT1 = torch.stack([windows.window(i) for i in own or [0]]).to(run.device)
        with run.engine.autocast():
            logits_BTV = run.model(ids_BT1[:, :-1]).logits_BTV
        if own:
            total += cross_entropy_sum(logits_BTV, ids_BT1[:, 1:])
    sum_over_world(total, "validation loss")
    return float(total) / (num_windows * config.train.seq_len)


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Σ over all tokens in nats, in fp32 (fp64 for fp64 logits)."""
    logits_NV = logits_BTV.flatten(0, 1)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
