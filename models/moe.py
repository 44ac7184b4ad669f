"""The Mixture-of-Experts layer: router → capacity → dispatch → experts → combine.

Shapes: B sequences, T positions, N = B·T tokens, D model width, E experts of the layer, K experts for each token.
"""

from typing import NamedTuple

from torch import Tensor, nn

from twohop.comm import TokenDispatcher
from twohop.models.capacity import drop_overflow, expert_capacity
from twohop.models.config import ModelConfig, Residual
from twohop.models.experts import Experts
from twohop.models.feed_forward import FeedForward
from twohop.models.routers import Routing, TokenInfo, build_router


class MoEStats(NamedTuple):
    """What one MoE layer says about one micro-batch; of this rank's tokens alone."""

    losses: dict[str, Tensor]  # scalars that belong to the training loss, already multiplied by their weights
    load_E: Tensor  # int64, assignments that chose each expert of the whole layer, dropped ones included
    dropped: Tensor  # int64 scalar, assignments dropped by the capacity


class MoELayer(nn.Module):
    """Sends every token to its experts, wherever they live, and adds up what they return.

    `experts` holds this rank's share of the layer's experts, as the dispatcher cuts it. Every rank of the
    dispatcher's EP group must call the layer (and its backward) equally often; token counts may differ.
    """

    def __init__(self, config: ModelConfig, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        moe, expert_ffn_dim = config.moe, config.moe.ffn_dim or config.ffn_dim
        self.config = moe
        self.dispatcher = dispatcher
        self.router = build_router(moe.router, config.dim, dispatcher.num_experts)
        self.experts = Experts(dispatcher.num_local_experts, config.dim, expert_ffn_dim, config.activation)
        self.shared = FeedForward(config.dim, moe.shared_ffn_dim, config.activation) if moe.shared_ffn_dim else None
        self.residual = ResidualBranch(config) if moe.residual is not Residual.none else None

    def forward(self, x_BTD: Tensor, about: TokenInfo | None = None) -> tuple[Tensor, MoEStats]:
        """[B, T, D] → [B, T, D] and the layer's statistics. Collective over the dispatcher's EP group."""
        x_ND = x_BTD.flatten(0, 1)
        routing: Routing = self.router(x_ND, about or TokenInfo(len(x_BTD)))
        ids_NK, weights_NK = self._apply_capacity(routing)

        y_ND, (shared_ND, dense_ND) = self.dispatcher.run(
            x_ND, ids_NK, weights_NK, self.experts, beside=lambda: self._beside(x_ND)
        )
        if shared_ND is not None:
            y_ND = y_ND + shared_ND
        if self.residual is not None:
            y_ND = self.residual(x_ND, y_ND, dense_ND)
        dropped = (ids_NK < 0).sum() - (routing.ids_NK < 0).sum()
        return y_ND.view_as(x_BTD), MoEStats(routing.losses, routing.load_E, dropped)

    def _beside(self, x_ND: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What needs no exchange and therefore runs beside the first hop: shared expert, dense MLP of the residual."""
        shared_ND = None if self.shared is None else self.shared(x_ND)
        return shared_ND, None if self.residual is None else self.residual.mlp(x_ND)

    def _apply_capacity(self, routing: Routing) -> tuple[Tensor, Tensor]:
        moe = self.config
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None:
            return routing.ids_NK, routing.weights_NK
        capacity = expert_capacity(
            num_tokens=routing.ids_NK.shape[0],
            num_experts=self.dispatcher.num_experts,
            top_k=moe.router.top_k,
            factor=factor,
            rounding=moe.capacity_rounding,
            minimum=moe.min_capacity,
        )
        return drop_overflow(routing.ids_NK, routing.weights_NK, capacity)


class ResidualBranch(nn.Module):
    """PR-MoE's dense MLP beside the routed experts (Rajbhandari 2022, DeepSpeed-MoE).

    `sum` adds the two as the paper does; `learned` mixes them with softmax(Linear(x)), as DeepSpeed's code does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config.dim, config.ffn_dim, config.activation)
        self.mix = nn.Linear(config.dim, 2) if config.moe.residual is Residual.learned else None

    def forward(self, x_ND: Tensor, routed_ND: Tensor, dense_ND: Tensor) -> Tensor:
        """Layer input, the experts' sum and what `mlp` made of the input, all [N, D] → [N, D]."""
        if self.mix is None:
            return routed_ND + dense_ND
        routed_part_N1, dense_part_N1 = self.mix(x_ND).softmax(-1).chunk(2, -1)
        return routed_ND * routed_part_N1 + dense_ND * dense_part_N1
