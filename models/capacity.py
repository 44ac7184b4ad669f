"""Expert capacity: how many rows an expert takes from one micro-batch, and which assignments it then drops.

The routing group is the micro-batch of one rank, so the result depends neither on the world size nor on the layout.

Shapes: N tokens of the micro-batch, E experts of the layer, K experts for each token.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

from twohop.models.config import BatchPriority, CapacityRounding


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
    ids_NK: Tensor, weights_NK: Tensor, capacity: int, priority: BatchPriority = BatchPriority.off
) -> tuple[Tensor, Tensor]:
    """Drops the assignments that come after the first `capacity` of their expert: id becomes -1, weight 0.

    A token that loses all its experts passes through the layer's residual stream unchanged. With a `priority`,
    queues fill in the order of the tokens' largest or summed weight instead of their own (batch priority routing,
    Riquelme 2021): what is kept then depends on all tokens of the micro-batch.
    """
    if priority is BatchPriority.off:
        position_NK = fill_positions(ids_NK)
    else:
        score_N = weights_NK.amax(-1) if priority is BatchPriority.max else weights_NK.sum(-1)
        order_N = score_N.argsort(descending=True, stable=True)
        position_NK = torch.empty_like(ids_NK)
        position_NK[order_N] = fill_positions(ids_NK[order_N])
    dropped_NK = position_NK >= capacity
    return ids_NK.masked_fill(dropped_NK, -1), weights_NK.masked_fill(dropped_NK, 0)
