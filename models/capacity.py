"""Expert capacity: how many rows an expert takes from one micro-batch, and which assignments it then drops.

The routing group is the micro-batch of one rank, so the result depends neither on the world size nor on the layout.
Rows are ragged: a capacity costs no memory here and moves no padding, it only drops. What systems that pad would
allocate is counted beside, as `rows`.

Shapes: N tokens of the micro-batch, E experts of the layer, K experts for each token.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from twohop.models.config import BatchPriority, CapacityPolicy, CapacityRounding, MoEConfig
from twohop.models.routers import Routing

SMOOTHING = 0.9  # of the moving average that a schedule follows: the part that stays at a step


def expert_capacity(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    factor: float,
    rounding: CapacityRounding = CapacityRounding.ceil,
    minimum: int = 0,
) -> int:
    """Rows that an expert takes: K·N·C/E (Riquelme 2021, V-MoE), rounded, and at least `minimum`.

    `ceil` rounds up (DeepSpeed, Megatron), `round` to the nearest and half to even (the paper), `ceil4` up to a
    multiple of 4 (the vmoe code), `tutel` is K·int(C·ceil(N/E)).
    """
    # The factor is meant as it is written: in floating point 1.1 · 10 is a little above 11 and would round up to 12.
    written = Fraction(str(factor))
    exact = written * top_k * num_tokens / num_experts
    if rounding is CapacityRounding.ceil:
        capacity = math.ceil(exact)
    elif rounding is CapacityRounding.round:
        capacity = round(exact)
    elif rounding is CapacityRounding.ceil4:
        capacity = 4 * math.ceil(Fraction(math.ceil(exact), 4))
    else:
        capacity = top_k * int(written * math.ceil(Fraction(num_tokens, num_experts)))
    return max(minimum, capacity)


def fill_positions(ids_NK: Tensor) -> Tensor:
    """The place of every assignment in its expert's queue, counted from 0; int64 [N, K].

    Queues fill choice by choice: every token's first choice before any second choice, inside one choice in token
    order. Tensor code throughout: no value is read on the host.
    """
    num_tokens, top_k = ids_NK.shape
    choice_major = ids_NK.T.reshape(-1)
    sorted_ids, order = choice_major.sort(stable=True)
    # In sorted order a queue is a run of equal ids: the place is the distance to where the run begins.
    run_start = torch.searchsorted(sorted_ids, sorted_ids)
    place = torch.arange(len(order), device=order.device) - run_start
    return torch.empty_like(order).scatter_(0, order, place).view(top_k, num_tokens).T


def drop_overflow(
    ids_NK: Tensor, weights_NK: Tensor, capacity: int | Tensor, priority: BatchPriority = BatchPriority.none
) -> tuple[Tensor, Tensor]:
    """Drops the assignments that come after the first `capacity` of their expert: id becomes -1, weight 0.

    A token that loses all its experts passes through the layer's residual stream unchanged. With a `priority`,
    queues fill in the order of the tokens' largest or summed weight instead of their own (batch priority routing,
    Riquelme 2021): what is kept then depends on all tokens of the micro-batch.
    """
    if priority is BatchPriority.none:
        position_NK = fill_positions(ids_NK)
    else:
        score_N = weights_NK.amax(-1) if priority is BatchPriority.max else weights_NK.sum(-1)
        order_N = score_N.argsort(descending=True, stable=True)
        position_NK = torch.empty_like(ids_NK)
        position_NK[order_N] = fill_positions(ids_NK[order_N])
    dropped_NK = position_NK >= capacity
    return ids_NK.masked_fill(dropped_NK, -1), weights_NK.masked_fill(dropped_NK, 0)


class Filled(NamedTuple):
    """What the capacity has left of a micro-batch's assignments."""

    ids_NK: Tensor  # int64; -1: dropped, or no expert in this place
    weights_NK: Tensor
    rows: Tensor  # int64 scalar: what a system that pads would allocate for every expert
    need: Tensor  # fp64 scalar: the capacity factor that would have dropped nothing


class Capacity(nn.Module):
    """The capacity of one layer's experts, by `capacity_policy` while training, at evaluation static."""

    need: Tensor  # of a schedule: fp64 scalar, the moving average

    def __init__(self, config: MoEConfig, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        if config.capacity_policy is CapacityPolicy.schedule:
            # A buffer, so that a resumed run goes on with it.
            self.register_buffer("need", torch.empty((), dtype=torch.float64))

    def init_buffers(self) -> None:
        """Nothing has been measured yet, and the first step drops nothing."""
        if self.config.capacity_policy is CapacityPolicy.schedule:
            self.need.fill_(math.inf)

    def forward(self, routing: Routing) -> Filled:
        """Drop what exceeds the capacity; no value is read on the host."""
        ids_NK, weights_NK, priority = routing.ids_NK, routing.weights_NK, self.config.batch_priority
        fullest = routing.load_E.max()
        need = fullest.double() * self.num_experts / max(1, ids_NK.numel())
        capacity = self._capacity(*ids_NK.shape)
        if capacity is None:
            return Filled(ids_NK, weights_NK, fullest, need)
        rows = capacity if isinstance(capacity, Tensor) else torch.full_like(fullest, capacity)
        if self.training and self.config.capacity_policy is CapacityPolicy.dynamic:
            rows = rows.minimum(fullest)
        return Filled(*drop_overflow(ids_NK, weights_NK, capacity, priority), rows, need)

    def after_step(self, need: float) -> None:
        """Learn, after an optimizer step, what its micro-batches needed in the mean; the same on all ranks."""
        if self.config.capacity_policy is CapacityPolicy.schedule:
            average = SMOOTHING * self.need + (1 - SMOOTHING) * need
            self.need.copy_(torch.where(self.need.isinf(), need, average))

    def _capacity(self, num_tokens: int, top_k: int) -> int | Tensor | None:
        """Rows that an expert takes; None: all that come. A bound drops the same whether a dynamic C reaches it."""
        config = self.config
        if not self.training:
            factor = config.eval_capacity_factor
        elif config.capacity_policy is CapacityPolicy.static:
            factor = config.capacity_factor
        else:
            factor = config.capacity_bound
        capacity = None
        if factor is not None:
            rounding, minimum = config.capacity_rounding, config.min_capacity
            capacity = expert_capacity(num_tokens, self.num_experts, top_k, factor, rounding, minimum)
        if not self.training or config.capacity_policy is not CapacityPolicy.schedule:
            return capacity
        # A token has an expert once at most, so no queue is longer than num_tokens.
        most = num_tokens if capacity is None else min(capacity, num_tokens)
        wanted = self.need * config.capacity_margin * top_k * num_tokens / self.num_experts
        return wanted.ceil().clamp(min=config.min_capacity).clamp(max=most).long()
