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
        return self.choose(about.for_each_token(self.gate(is_task_BS), len(x_ND)), about)


class SentenceRouter(SoftmaxTopKRouter):
    """softmax top-k of the mean state of a sequence: each of its tokens depends on all the others.

    A decoder of translations, whose own later tokens are not known, goes by the mean state of the source instead.
    """

    looks_ahead = "the gate sees the mean of the whole sequence"

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each sequence as a whole."""
        mean_BD = about.sentence_BD if about.sentence_BD is not None else about.mean(x_ND)
        return self.choose(about.for_each_token(self.gate(mean_BD), len(x_ND)), about)
