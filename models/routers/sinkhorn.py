"""Balanced assignment while training (Lewis 2021, BASE layers), by Sinkhorn's iteration (Clark 2022, S-BASE; Megatron).

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, K experts for each token.
"""

import math

from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Gate, Router, Routing, TokenInfo


class SinkhornRouter(Router):
    """Chooses by exp(W x) with rows and columns scaled to equal sums; without scaling at evaluation.

    Weights are sigmoid(W x) of the chosen experts for K = 1, softmax(W x) for more, as in Megatron. No loss has to
    balance, since the choice does.
    """

    looks_ahead = "tokens are shared out among experts together with all others of the micro-batch"
    options = frozenset({"jitter", "z_loss", "iterations"})

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.gate = Gate(dim, num_experts, config.jitter)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes all tokens together while training, each by itself at evaluation."""
        logits_NE = self.gate(x_ND)
        probs_NE = logits_NE.softmax(-1)
        judged_NE = log_sinkhorn(logits_NE.detach(), self.config.iterations) if self.training else logits_NE
        ids_NK = judged_NE.topk(self.config.top_k, -1).indices
        scores_NE = logits_NE.sigmoid() if self.config.top_k == 1 else probs_NE
        return self.routing(about, ids_NK, scores_NE.gather(1, ids_NK), logits_NE, probs_NE)


def log_sinkhorn(logits_NE: Tensor, iterations: int) -> Tensor:
    """log of the matrix a_n · exp(logits) · b_e whose rows sum to 1 / N and, nearly, columns to 1 / E."""
    num_tokens, num_experts = logits_NE.shape
    for _ in range(iterations if num_tokens else 0):
        logits_NE = logits_NE - logits_NE.logsumexp(0, keepdim=True) - math.log(num_experts)
        logits_NE = logits_NE - logits_NE.logsumexp(1, keepdim=True) - math.log(num_tokens)
    return logits_NE
