"""Softmax over all experts, then the K largest (Lepikhin 2020, GShard; OLMoE without, Qwen3 with renormalisation).

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, K experts for each token.
"""

from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Gate, Router, Routing, TokenInfo

BALANCE = frozenset({"load_balance_loss", "load_balance_over", "sequence_loss", "z_loss"})


class SoftmaxTopKRouter(Router):
    """p = softmax(W x); the K largest p are the weights, divided by their sum if `renormalize`."""

    options = BALANCE | {"renormalize", "jitter"}

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.gate = Gate(dim, num_experts, config.jitter)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each token by itself."""
        return self.choose(self.gate(x_ND), about)

    def choose(self, logits_NE: Tensor, about: TokenInfo) -> Routing:
        """From logits to the decision."""
        probs_NE = logits_NE.softmax(-1)
        weights_NK, ids_NK = probs_NE.topk(self.config.top_k, -1)
        if self.config.renormalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        return self.routing(about, ids_NK, weights_NK, logits_NE, probs_NE)
