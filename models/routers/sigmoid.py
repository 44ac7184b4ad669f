"""DeepSeek-V3's router (DeepSeek-AI 2024): sigmoid scores, balanced by a bias, limited to some groups of experts.

Shapes: N tokens of the micro-batch, D model width, E experts of the layer, K experts for each token, G groups.
"""

import torch
from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Gate, Router, Routing, TokenInfo
from twohop.models.routers.softmax_topk import BALANCE


class SigmoidRouter(Router):
    """s = sigmoid(W x); the K largest s + b of the allowed groups are chosen, and s, without b, are their weights.

    A group is worth the sum of its two largest s + b; the `top_groups` best groups are allowed. Groups are runs of
    E / groups experts. Expert e lives on EP rank e // (E / EP) and ranks stand node by node, so with as many groups
    as the EP group has nodes (or a multiple), a token goes to at most `top_groups` nodes.

    The bias is a buffer that no gradient touches. After a step b moves by `bias_rate` · sign(mean load - load), with
    the load of the global batch: the same on all ranks.
    """

    options = BALANCE | {"renormalize", "scale", "jitter", "groups", "top_groups", "bias_rate"}
    bias: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_experts: int) -> None:
        super().__init__(config, num_experts)
        if num_experts % config.groups:
            raise ValueError(
                f"model.moe.router.groups={config.groups} does not divide the {num_experts} experts of a layer: "
                "use a divisor"
            )
        allowed = config.top_groups * (num_experts // config.groups)
        if allowed < config.top_k:
            raise ValueError(
                f"model.moe.router.top_groups={config.top_groups} of groups={config.groups} leave a token {allowed} of "
                f"{num_experts} experts, but top_k={config.top_k}: raise top_groups or lower top_k"
            )
        self.gate = Gate(dim, num_experts, config.jitter)
        self.register_buffer("bias", torch.zeros(num_experts))

    def init_buffers(self, generator: torch.Generator) -> None:
        """No expert is preferred."""
        self.bias.zero_()

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each token by itself."""
        logits_NE = self.gate(x_ND)
        scores_NE = logits_NE.sigmoid()
        ids_NK = self._select((scores_NE + self.bias.to(scores_NE.dtype)).detach())
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.config.renormalize:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        probs_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        return self.routing(about, ids_NK, weights_NK * self.config.scale, logits_NE, probs_NE)

    def after_step(self, load_E: Tensor) -> None:
        """Move the bias towards the experts with less than the mean load."""
        super().after_step(load_E)
        self.bias += self.config.bias_rate * (load_E.mean() - load_E).sign().to(self.bias.dtype)

    def _select(self, biased_NE: Tensor) -> Tensor:
        groups, top_groups = self.config.groups, self.config.top_groups
        if top_groups < groups:
            grouped_NGe = biased_NE.unflatten(-1, (groups, -1))
            worth_NG = grouped_NGe.topk(min(2, grouped_NGe.shape[-1]), -1).values.sum(-1)
            is_closed_NG = torch.ones_like(worth_NG, dtype=torch.bool)
            is_closed_NG.scatter_(1, worth_NG.topk(top_groups).indices, False)
            biased_NE = grouped_NGe.masked_fill(is_closed_NG[..., None], float("-inf")).flatten(-2)
        return biased_NE.topk(self.config.top_k, -1).indices
