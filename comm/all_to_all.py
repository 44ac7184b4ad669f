"""The bare collective: ragged, differentiable all-to-all, flat or level by level, usable without any model.

Rows for rank (m, l) go `two_level` first inside the node to local rank l, then between nodes along the rail: the
slow network sees M - 1 messages per rank instead of L * (M - 1), each L times larger, with the same bytes
(DeepSpeed-MoE 2022; Tutel's 2DH, 2022). Both algorithms return the same bits.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from twohop.comm.counts import WRONG_COUNTS, check_headers, exchange_counts
from twohop.comm.errors import CommError
from twohop.comm.exchange import Channel
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter

AllToAll = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class _Step:
    """Reorder blocks of rows, then exchange them along one axis."""

    channel: Channel
    block_rows: list[int]  # rows of each block as they stand
    order: list[int]  # blocks in sending order
    send_rows: list[int]
    recv_rows: list[int]


@dataclass(frozen=True)
class _Way:
    """All steps of one exchange, and the order of the blocks that arrive last."""

    steps: tuple[_Step, ...]
    block_rows: list[int]
    order: list[int]

    def there(self, rows: torch.Tensor, phase: str) -> torch.Tensor:
        for step in self.steps:
            rows = _reorder(rows, step.block_rows, step.order)
            rows = step.channel.start(rows, step.send_rows, step.recv_rows, phase).wait()
        return _reorder(rows, self.block_rows, self.order)

    def back(self, rows: torch.Tensor, phase: str) -> torch.Tensor:
        rows = _undo_reorder(rows, self.block_rows, self.order)
        for step in reversed(self.steps):
            rows = step.channel.start(rows, step.recv_rows, step.send_rows, phase).wait()
            rows = _undo_reorder(rows, step.block_rows, step.order)
        return rows


def build_all_to_all(name: str, topology: Topology, *, label: str = "", meter: TrafficMeter | None = None) -> AllToAll:
    """The collective over the topology's EP group of P ranks: `flat`, or `two_level` (one hop for each level).

    Returns:
        A function (rows [R, ...], send_counts int64 [P]) -> (received rows, recv_counts int64 [P]) that every rank
        of the group must call. Rows stand in order of their destination, arrivals in order of their source; any
        dtype; differentiable in rows, the backward takes the same hops. Rows of all ranks must agree in dtype and
        trailing shape.

    Raises:
        ValueError: unknown name. The function itself raises ValueError for counts that do not fit the rows, on the
        rank where they are wrong, and CommError on the others, as when a peer does something else, died or did not
        come.
    """
    if name not in ("flat", "two_level"):
        raise ValueError(f"unknown all-to-all {name!r}: use flat or two_level")
    title = f"{name} all-to-all"
    axes = [axis for axis in topology.axes if axis.size > 1]
    hops: list[tuple[list[int], Channel]] = []  # axes to exchange along together, innermost level first
    if axes and (name == "flat" or len(axes) == 1):
        hops = [(list(range(len(axes))), Channel.make(topology, topology.ep_group, label, meter, title))]
    elif axes:
        hops = [([i], Channel.make(topology, axes[i].group, label, meter, title)) for i in reversed(range(len(axes)))]
    block = [axis.size for axis in axes]

    def all_to_all(rows: torch.Tensor, send_counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = "with" if torch.is_grad_enabled() and rows.requires_grad else "without"
        task = f"{title} of {rows.dtype} rows {list(rows.shape[1:])} {gradient} gradient, {label}"
        if problem := _problem(rows, send_counts, topology):
            nothing = torch.zeros(topology.ep_size, dtype=torch.int64, device=rows.device)
            with contextlib.suppress(CommError):  # the others hear of it in the header of the counts
                _make_way(nothing, block, hops, task, WRONG_COUNTS)
            raise ValueError(problem)
        way, recv_counts = _make_way(send_counts, block, hops, task)
        return _AllToAll.apply(rows, way), recv_counts

    return all_to_all


def _problem(rows: torch.Tensor, send_counts: torch.Tensor, topology: Topology) -> str:
    """What is wrong with the arguments, or nothing."""
    where = f"rank {topology.rank}: all_to_all"
    if send_counts.shape != (topology.ep_size,) or send_counts.dtype != torch.int64:
        got = f"{send_counts.dtype} {list(send_counts.shape)}"
        return f"{where}: send_counts must be int64 [{topology.ep_size}], got {got}"
    if bool((send_counts < 0).any()) or int(send_counts.sum()) != len(rows):
        return f"{where}: send_counts {send_counts.tolist()} do not add up to the {len(rows)} rows"
    return ""


def _make_way(
    send_counts: torch.Tensor,
    block: Sequence[int],
    hops: Sequence[tuple[list[int], Channel]],
    task: str,
    status: int = 0,
) -> tuple[_Way, torch.Tensor]:
    """Exchange the counts hop by hop; an exchange along an axis turns its destinations into sources."""
    counts = send_counts.view(list(block))  # rows of each block, by destination and, once exchanged, by source
    standing = list(range(len(block)))  # how blocks stand: the first dimension varies slowest
    own_status, hearsay = counts.new_tensor(status), counts.new_zeros(2)
    steps, headers = [], []
    for axes, channel in hops:
        moved = [*axes, *(axis for axis in standing if axis not in axes)]
        incoming, hearsay, header = exchange_counts(counts, axes, channel, task, own_status, hearsay)
        headers.append(header)
        steps.append(
            _Step(
                channel,
                counts.permute(standing).flatten().tolist(),
                _block_order(block, standing, moved),
                _by_peer(counts, axes),
                _by_peer(incoming, axes),
            )
        )
        counts, standing = incoming, moved
    for (_, channel), header in zip(hops, headers, strict=True):
        check_headers(header.tolist(), channel, task)
    final = list(range(len(block)))
    way = _Way(tuple(steps), counts.permute(standing).flatten().tolist(), _block_order(block, standing, final))
    return way, counts.flatten()


def _by_peer(counts: torch.Tensor, axes: Sequence[int]) -> list[int]:
    """Rows for each peer of an exchange along `axes`."""
    others = [axis for axis in range(counts.dim()) if axis not in axes]
    return (counts.sum(others) if others else counts).flatten().tolist()


def _block_order(block: Sequence[int], standing: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Where each block of the wanted order stands now."""
    places = torch.arange(math.prod(block)).view([block[axis] for axis in standing])
    return places.permute([standing.index(axis) for axis in wanted]).flatten().tolist()


def _reorder(rows: torch.Tensor, block_rows: list[int], order: list[int]) -> torch.Tensor:
    if order == sorted(order):
        return rows
    blocks = rows.split(block_rows)
    return torch.cat([blocks[i] for i in order])


def _undo_reorder(rows: torch.Tensor, block_rows: list[int], order: list[int]) -> torch.Tensor:
    blocks = [block_rows[i] for i in order]
    places = sorted(range(len(order)), key=order.__getitem__)
    return _reorder(rows, blocks, places)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, way: _Way) -> torch.Tensor:
        ctx.way = way
        return way.there(rows, "all-to-all")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.way.back(grad.contiguous(), "all-to-all backward"), None
