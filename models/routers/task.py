"""Task-level routing and its baseline by sentence (Kudugunta 2021, Beyond Distillation); by token: `softmax_topk`.

Shapes: B sequences, T positions, N = B·T tokens of the micro-batch, D model width, E experts of the layer,
K experts for each token, S tasks.
"""

import torch.nn.functional as F
from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Routing, TokenInfo
from twohop.models.routers.softmax_topk import BALANCE, SoftmaxTopKRouter


class TaskRouter(SoftmaxTopKRouter):
    """Logits learned for each task; all tokens of a sequence go where its task goes.

    So one task uses K experts of the layer, and a model of this task alone needs no others.
    """

    options = BALANCE | {"renormalize"}
    sizes = ("num_tasks",)

    def __init__(self, config: RouterConfig, dim: int, num_experts: int, num_tasks: int) -> None:
        super().__init__(config, num_tasks, num_experts)
        self.num_tasks = num_tasks

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each sequence by `about.task_B`; raises ValueError where nobody knows the tasks."""
        if about.task_B is None:
            raise ValueError(
                "model.moe.router.name=task: this model or its data knows no tasks; use softmax_topk or sentence"
            )
        is_task_BS = F.one_hot(about.task_B, self.num_tasks).to(self.gate.weight.dtype)
        return self.choose(_repeat(self.gate(is_task_BS), x_ND), about)


class SentenceRouter(SoftmaxTopKRouter):
    """softmax top-k of the mean state of a sequence: each of its tokens depends on all the others."""

    causal = False

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each sequence as a whole."""
        mean_BD = x_ND.unflatten(0, (about.num_sequences, -1)).mean(1)
        return self.choose(_repeat(self.gate(mean_BD), x_ND), about)


def _repeat(logits_BE: Tensor, x_ND: Tensor) -> Tensor:
    """A sequence's logits for each of its tokens: [B, E] → [N, E]."""
    return logits_BE.repeat_interleave(len(x_ND) // max(1, len(logits_BE)), 0)
