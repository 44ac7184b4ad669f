"""Softmax over all experts, then the K largest (Lepikhin 2020, GShard; OLMoE without, Qwen3 with renormalisation).

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, K experts for each token.
"""

from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import (
    Gate,
    Router,
    Routing,
    TokenInfo,
    count_assignments,
    load_balance_loss,
    z_loss,
)


class SoftmaxTopKRouter(Router):
    """p = softmax(W x); the K largest p are the weights, divided by their sum if `renormalize`."""

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.gate = Gate(dim, num_experts, config.jitter)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each token by itself."""
        config = self.config
        logits_NE = self.gate(x_ND)
        probs_NE = logits_NE.softmax(-1)
        weights_NK, ids_NK = probs_NE.topk(config.top_k, -1)
        if config.renormalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        load_E = count_assignments(ids_NK, self.num_experts)
        losses = {}
        if config.load_balance_loss > 0:
            losses["load_balance"] = config.load_balance_loss * load_balance_loss(probs_NE, load_E, config.top_k)
        if config.z_loss > 0:
            losses["z"] = config.z_loss * z_loss(logits_NE)
        return Routing(ids_NK, weights_NK, losses, load_E)
