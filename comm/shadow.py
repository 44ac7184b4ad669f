"""Rows of experts on every rank of an EP group, for the tokens of that rank alone.

An expert that very many tokens choose is a queue at one rank. To bring its weights to all ranks may cost less than to
bring all those tokens to it (shadow experts: FasterMoE, He 2022).

Shapes: E experts of this rank, H experts with shadows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from twohop.comm.clock import EXPOSED
from twohop.comm.exchange import Channel


def fetch(weights: Sequence[Tensor], slots: Sequence[int], channel: Channel) -> tuple[Tensor, ...]:
    """Of each weight the rows of `slots`, on every rank: [H, ...] each, differentiable.

    Every rank of the channel's group, which is the EP group, must call this with the same slots, and its backward:
    there the gradients of all ranks are added up, in fp32, where a row lives. One all-reduce in either direction.

    Args:
        weights: this rank's rows [E, ...] of each; slot s is row s % E of rank s // E.
        slots: ascending.

    Raises:
        CommError: a rank died, failed or did not come before the deadline of the group.
    """
    rows: tuple[Tensor, ...] = _Fetch.apply(tuple(slots), channel, *weights)
    return rows


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: tuple[int, ...], channel: Channel, *weights: Tensor) -> tuple[Tensor, ...]:
        own = channel.topology.ep_rank
        place = [divmod(slot, len(weights[0])) for slot in slots]
        ctx.channel, ctx.shapes = channel, [weight.shape for weight in weights]
        ctx.shadows = [h for h, (rank, _) in enumerate(place) if rank == own]  # whose rows live here
        ctx.rows = [row for rank, row in place if rank == own]
        parts = [weight.new_zeros(len(slots), *weight.shape[1:]) for weight in weights]
        for part, weight in zip(parts, weights, strict=True):
            part[ctx.shadows] = weight[ctx.rows]
        return tuple(_sum(parts, channel, "shadows"))  # every row has one rank that adds more than 0

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
        totals = _sum(wide, ctx.channel, "shadows backward")
        of_rows = [grad.new_zeros(shape) for grad, shape in zip(grads, ctx.shapes, strict=True)]
        for of_row, total in zip(of_rows, totals, strict=True):
            of_row[ctx.rows] = total[ctx.shadows].to(of_row.dtype)
        return None, None, *of_rows


def _sum(parts: Sequence[Tensor], channel: Channel, phase: str) -> list[Tensor]:
    """Of all ranks, in one message; metered as a ring sends it."""
    flat, ranks = torch.cat([part.flatten() for part in parts]), len(channel.ranks)
    with channel.clock.phase(EXPOSED, channel.place(phase)):
        try:
            dist.all_reduce(flat, group=channel.group)
        except RuntimeError as error:
            raise channel.failure(phase, error) from error
    if channel.meter is not None:
        to_next = channel.levels[(channel.topology.ep_rank + 1) % ranks]
        channel.meter.record(to_next, phase, 2 * (ranks - 1) * flat.nbytes // ranks, 2 * (ranks - 1))
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]
