"""The Mixture-of-Experts layer: router → capacity → dispatch → experts → combine.

Shapes: B sequences, T positions, N = B·T tokens, D model width, E experts of the layer, K experts for each token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from twohop.comm import Planned, TokenDispatcher
from twohop.models.assignment_cache import AssignmentCache
from twohop.models.capacity import Capacity
from twohop.models.config import ModelConfig, Residual
from twohop.models.experts import ExpertPass, Experts
from twohop.models.feed_forward import FeedForward
from twohop.models.quantize import QuantizedExperts
from twohop.models.routers import Routing, TokenInfo, build_router
from twohop.models.shadows import Shadows


class MoEStats(NamedTuple):
    """What one MoE layer says about one micro-batch; of this rank's tokens alone."""

    losses: dict[str, Tensor]  # scalars that belong to the training loss, already multiplied by their weights
    load_E: Tensor  # int64, assignments that chose each expert of the whole layer, dropped ones included
    dropped: Tensor  # int64 scalar, assignments dropped by the capacity
    rows: Tensor  # int64 scalar, rows that a system that pads would allocate for every expert
    need: Tensor  # fp64 scalar, the capacity factor that would have dropped nothing
    repeated: Tensor  # int64 scalar, assignments that are as they were when their sample came before
    compared: Tensor  # int64 scalar, assignments of samples that came before, where they are cached
    replayed: Tensor  # int64 scalar, 1 if the router was skipped for a cached plan
    tokens: Tensor  # int64 scalar, that were routed
    top_weight: Tensor  # fp64 scalar, the sum over these tokens of the largest weight of their experts


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
        self.router = build_router(moe.router, config.dim, dispatcher.num_experts, config.vocab_size, config.num_tasks)
        self.capacity = Capacity(moe, dispatcher.num_experts)
        self.slots_E: Tensor | None = None  # int64, where each expert lives among all; None: in the order of numbers
        self.shadows: Shadows | None = None
        self.observe: Callable[[Tensor], None] | None = None  # sees the experts [N, K] of each micro-batch in training
        self.cache: AssignmentCache[MoEStats] | None = None
        if moe.cache.enabled:
            self.cache = AssignmentCache(moe.cache, dispatcher.num_experts)
        experts = (dispatcher.num_local_experts, config.dim, expert_ffn_dim, config.activation)
        self.experts = Experts(*experts) if moe.expert_bits is None else QuantizedExperts(*experts, moe.expert_bits)
        self.shared = FeedForward(config.dim, moe.shared_ffn_dim, config.activation) if moe.shared_ffn_dim else None
        self.residual = ResidualBranch(config) if moe.residual is not Residual.none else None

    @property
    def carrier(self) -> Any:
        """What brings tokens to their experts: the dispatcher, but for experts with shadows."""
        return self.shadows or self.dispatcher

    def forward(self, x_BTD: Tensor, about: TokenInfo | None = None) -> tuple[Tensor, MoEStats]:
        """[B, T, D] → [B, T, D] and the layer's statistics. Collective over the dispatcher's EP group."""
        x_ND = x_BTD.flatten(0, 1)
        planned, stats = self.plan(x_ND, about or TokenInfo(len(x_BTD)))
        experts = self.experts.begin(x_ND)
        y_ND, (shared_ND, dense_ND) = self.carrier.follow(
            planned, x_ND, experts, beside=lambda: self._beside(x_ND, experts)
        )
        if shared_ND is not None:
            y_ND = y_ND + shared_ND
        if self.residual is not None:
            y_ND = self.residual(x_ND, y_ND, dense_ND)
        return y_ND.view_as(x_BTD), stats

    def after_step(self, total: MoEStats, micro_batches: int) -> None:
        """Learn, after an optimizer step, from this layer's statistics added up over the micro-batches of all ranks."""
        if not total.load_E.any():  # the layer was left out of this step
            return
        if not total.replayed:
            self.router.after_step(total.load_E)
        self.capacity.after_step(float(total.need) / micro_batches)
        if self.cache is not None:
            self.cache.after_step(float(total.repeated), float(total.compared))

    def plan(self, x_ND: Tensor, about: TokenInfo) -> tuple[Planned, MoEStats]:
        """Who goes where: by the router, or as it was when this micro-batch came before. Collective like `forward`."""
        cache = self.cache if self.training else None
        samples = about.samples() if cache else ()
        if cache and (kept := cache.find(samples)):
            return kept
        routing: Routing = self.router(x_ND, about)
        filled = self.capacity(routing)
        if self.observe is not None and self.training:
            self.observe(filled.ids_NK)
        ids_NK = self._slots(filled.ids_NK)
        planned = self.carrier.plan(x_ND, ids_NK, filled.weights_NK, self.experts.counts_on_device)
        dropped = (filled.ids_NK < 0).sum() - (routing.ids_NK < 0).sum()
        zero = torch.zeros_like(dropped)
        tokens = torch.full_like(dropped, len(routing.weights_NK))
        top_weight = routing.weights_NK.detach().amax(-1).sum(dtype=torch.float64)
        filling = (dropped, filled.rows, filled.need)
        stats = MoEStats(routing.losses, routing.load_E, *filling, zero, zero, zero, tokens, top_weight)
        if cache:
            cache.keep(samples, planned, stats._replace(losses={}, replayed=zero + 1))
            stats = stats._replace(**cache.compare(samples, about, filled.ids_NK)._asdict())
        return planned, stats

    def _slots(self, ids_NK: Tensor) -> Tensor:
        """Where experts live, by their numbers; a negative one, of a dropped assignment, stays."""
        if self.slots_E is None:
            return ids_NK
        return torch.where(ids_NK >= 0, self.slots_E[ids_NK.clamp(min=0)], ids_NK)

    def idle(self) -> MoEStats:
        """The statistics of a pass that leaves the layer out."""
        device = next(self.experts.parameters()).device
        load_E = torch.zeros(self.dispatcher.num_experts, dtype=torch.int64, device=device)
        zero = load_E.sum()
        return MoEStats({}, load_E, zero, zero, zero.double(), zero, zero, zero, zero, zero.double())

    def _beside(self, x_ND: Tensor, experts: ExpertPass | QuantizedExperts) -> tuple[Tensor | None, Tensor | None]:
        """What needs no exchange and therefore runs beside the first hop: shared expert, dense MLP of the residual.

        Its backward runs beside the last exchange of the backward pass; so do the gradients of the experts' weights.
        """
        experts.open()
        shared_ND = None if self.shared is None else self.shared(x_ND)
        return shared_ND, None if self.residual is None else self.residual.mlp(x_ND)


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
