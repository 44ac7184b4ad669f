"""What a micro-batch is trained for: its targets, the routers' losses, and a teacher where there is one.

Shapes: N targets, V classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from twohop.models import ModelOutput
from twohop.trainer.data import IGNORED, Batch
from twohop.trainer.distill import Teacher


class Objective:
    """The parts of the training loss, each summed over the targets of a micro-batch.

    Sums add up over micro-batches and ranks; the loop divides them by the number of targets of the global batch.
    """

    def __init__(self, teacher: Teacher | None = None) -> None:
        self.teacher = teacher

    def __call__(self, batch: Batch, output: ModelOutput, num_targets: int, progress: float) -> dict[str, Tensor]:
        """`loss` and `aux_loss`, and what the teacher adds; what is trained for is the sum of all.

        Args:
            batch: the micro-batch, on the model's device.
            output: what the model made of it.
            num_targets: targets of the micro-batch that count.
            progress: steps done ÷ steps of the run.

        With a teacher, every rank of the world must call this equally often.
        """
        cross_entropy = cross_entropy_sum(output.logits, batch.targets)
        # A router's loss is a mean over the micro-batch: times its targets, it adds up over micro-batches as well.
        layer_losses = [loss for stats in output.moe for loss in stats.losses.values()] + list(output.losses.values())
        aux_loss = sum(layer_losses, torch.zeros_like(cross_entropy)) * num_targets
        parts = {"loss": cross_entropy, "aux_loss": aux_loss}
        if self.teacher is not None:
            parts |= self.teacher.losses(batch, output.logits, progress)
        return parts


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ over all targets in nats, of logits [*targets.shape, V], in fp32 (fp64 for fp64 logits); IGNORED ones are 0."""
    logits_NV = logits.flatten(0, -2)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets.flatten(), ignore_index=IGNORED, reduction="sum")
