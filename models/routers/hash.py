"""A fixed expert for each token of the vocabulary (Roller 2021, Hash Layers): nothing is learned, nothing balanced.

Shapes: N tokens of the micro-batch, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Router, Routing, TokenInfo, count_assignments


class HashRouter(Router):
    """The expert of a token is `table_V[token id]`, its weight 1. Every expert has the same number of ids, ± 1.

    The table is a buffer, drawn from the seed of the run and kept in checkpoints.
    """

    sizes = ("vocab_size",)
    table_V: Tensor

    def __init__(self, config: RouterConfig, dim: int, num_experts: int, vocab_size: int) -> None:
        super().__init__(config, num_experts)
        if config.top_k != 1:
            raise ValueError(
                f"model.moe.router.top_k={config.top_k}: the hash router knows 1 expert for a token; set top_k=1"
            )
        self.register_buffer("table_V", torch.arange(vocab_size) % num_experts)

    def init_buffers(self, generator: torch.Generator) -> None:
        """Share the ids out at random."""
        self.table_V.copy_(torch.randperm(len(self.table_V), generator=generator, device="cpu") % self.num_experts)

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Routes each token by its id; raises ValueError where the model has no token ids."""
        if about.token_BT is None:
            raise ValueError(
                "model.moe.router.name=hash: this model's inputs are no tokens of a vocabulary; use another"
            )
        ids_N1 = self.table_V[about.token_BT].reshape(-1, 1)
        weights_N1 = torch.ones_like(ids_N1, dtype=torch.promote_types(x_ND.dtype, torch.float32))
        return Routing(ids_N1, weights_N1, {}, count_assignments(ids_N1, self.num_experts))
