"""Experts that choose their tokens (Zhou 2022, Mixture-of-Experts with Expert Choice Routing).

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, c experts of a token on average.
"""

import torch
from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Gate, Router, Routing, TokenInfo


class ExpertChoiceRouter(Router):
    """p = softmax(W x) over the experts; each expert takes the N · c / E tokens with its largest p, and p weighs.

    `top_k` is c, which is 2 in the paper. Every expert has the same load, rounded down but at least one token; a
    token has between 0 and E experts, so its places [N, E] are filled from the largest p and end in -1.
    """

    looks_ahead = "an expert chooses among all tokens of the micro-batch"
    options = frozenset({"jitter", "z_loss"})

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.gate = Gate(dim, num_experts, config.jitter)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes all tokens together."""
        logits_NE = self.gate(x_ND)
        probs_NE = logits_NE.softmax(-1)
        num_tokens = len(x_ND)
        taken = min(num_tokens, max(1, num_tokens * self.config.top_k // self.num_experts))
        tokens_nE = probs_NE.topk(taken, 0).indices
        is_chosen_NE = torch.zeros_like(probs_NE, dtype=torch.bool).scatter_(0, tokens_nE, True)
        # A probability of 0 may be chosen as well, so what is not chosen stands behind it.
        ids_NE = probs_NE.masked_fill(~is_chosen_NE, -1).argsort(dim=-1, descending=True, stable=True)
        is_chosen_NE = is_chosen_NE.gather(1, ids_NE)
        weights_NE = probs_NE.gather(1, ids_NE).masked_fill(~is_chosen_NE, 0)
        return self.routing(about, ids_NE.masked_fill(~is_chosen_NE, -1), weights_NE, logits_NE, probs_NE)
