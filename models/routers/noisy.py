"""V-MoE's router (Riquelme 2021): softmax top-k of noisy logits, balanced by importance and load.

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, K experts for each token.
"""

import torch
from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Gate, Router, Routing, TokenInfo


class NoisyRouter(Router):
    """p = softmax(W x + ε), ε ~ N(0, (noise / E)²) while training; the K largest p are the weights, as they are.

    `importance_loss` judges softmax(W x), `load_loss` the chances under new noise; there is none without noise.
    """

    options = frozenset({"noise", "importance_loss", "load_loss", "z_loss"})

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        self.gate = Gate(dim, num_experts)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each token by itself."""
        logits_NE = noisy_NE = self.gate(x_ND)
        std = self.config.noise / self.num_experts
        adds_noise = self.training and std > 0
        if adds_noise:
            noisy_NE = logits_NE + std * torch.randn_like(logits_NE)
        probs_NE = noisy_NE.softmax(-1)
        weights_NK, ids_NK = probs_NE.topk(self.config.top_k, -1)
        noise = {"noisy_NE": noisy_NE, "noise_std": std} if adds_noise else {}
        return self.routing(about, ids_NK, weights_NK, logits_NE, probs_NE, **noise)
