"""The one exchange of counts that plans all hops and chunks, and the agreement on what is about to happen.

Counts stand as [*block, chunks, F]: one place for each rank of the EP group's grid and each chunk of tokens. They
walk the route of the rows; an exchange along an axis turns that axis from destinations into sources. So every
rank on the way learns, from messages of a fixed size, how many rows come and go at each of its hops.

Every message begins with a header: fingerprint of the task, status of the sender, and two things known by hearsay:
a rank in trouble, and the most tokens that any rank brings (by which `auto` chooses its next way).
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twohop.comm.diagnose import give_up
from twohop.comm.errors import CommError, NotFiniteError
from twohop.comm.exchange import Channel
from twohop.comm.routes import Hop

HEADER = 4
# Rooms for a peer's message, in numbers: one of another layer, or with other chunks, must fit as well.
LEAST_ROOM, ROOM_FACTOR = 4096, 16

NOT_FINITE, WRONG_COUNTS, WRONG_EXPERTS = 1, 2, 3
KINDS = 4  # of status, 0 included
STATUS = {
    NOT_FINITE: "was given rows that are not finite",
    WRONG_COUNTS: "was given counts that do not fit its rows",
    WRONG_EXPERTS: "was given expert ids that the layer does not have",
}


@dataclass(frozen=True)
class Grid:
    """How experts and ranks of an EP group are numbered: expert -> rank -> coordinates, all in nested order."""

    block: tuple[int, ...]  # ranks along each axis
    num_experts: int

    @property
    def experts_per_rank(self) -> int:
        """Experts on each rank of the group."""
        return self.num_experts // math.prod(self.block)

    def subtree(self, expert_n: torch.Tensor, level: int) -> torch.Tensor:
        """Number of the subtree, down to `level`, that an expert lives in."""
        return expert_n // (self.experts_per_rank * math.prod(self.block[level + 1 :]))

    def peer(self, expert_n: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """Number of the peer towards the expert's rank, in the group that spans consecutive `axes`."""
        return self.subtree(expert_n, axes[-1]) % math.prod(self.block[axis] for axis in axes)


@dataclass(frozen=True)
class HopCounts:
    """Sizes of one hop, as host integers."""

    send_rows: list[list[int]]  # [chunk][peer]
    recv_rows: list[list[int]]
    send_assignments: list[int]  # [peer], all chunks together
    recv_assignments: list[int]


@dataclass(frozen=True)
class Counts:
    """Everything about sizes that a rank must know."""

    own: int  # assignments of this rank's tokens
    own_rows: list[list[int]]  # [level][chunk]: (token, subtree) pairs of this rank's tokens
    hops: list[HopCounts]
    per_expert: list[list[int]]  # [chunk][local expert]: rows that arrive
    home_n: torch.Tensor  # home rank of each assignment that arrives, by chunk, then in order of arrival
    most_tokens: int  # of any rank of the group


def agree(
    counts: torch.Tensor,
    grid: Grid,
    hops: Sequence[tuple[Hop, Channel]],
    task: str,
    status: torch.Tensor,
    num_tokens: int,
) -> Counts:
    """Walk the counts. Every rank of the EP group must call this.

    Args:
        counts: int64 [*block, chunks, experts_per_rank + levels] of this rank's tokens, by destination: assignments
            of each expert, then distinct (token, subtree) pairs of each level, repeated inside the subtree.
        task: what this rank is about to do.
        status: int64 scalar, 0 or a key of STATUS.
        num_tokens: of this rank.

    Raises:
        CommError: a rank is about to do something else, is in trouble, died or did not come.
    """
    experts, levels = grid.experts_per_rank, range(len(grid.block))
    own = counts[..., :experts].sum()
    own_rows = [_by_chunk(_without_repeats(counts[..., experts + level], level)) for level in levels]
    level = -1  # the deepest level spread so far: a row is a (token, subtree of this level) pair
    hearsay = torch.stack([torch.zeros_like(status), torch.full_like(status, num_tokens)])
    sizes, headers = [], []
    for hop, channel in hops:
        level = max((level, *hop.spread))
        before = counts
        counts, hearsay, header = exchange_counts(before, hop.exchange, channel, task, status, hearsay)
        rows = [_without_repeats(side[..., experts + level], level) for side in (before, counts)]
        assignments = [side[..., :experts].sum((-1, -2)) for side in (before, counts)]
        sizes.append([_by_peer(side, hop.exchange) for side in (*rows, *(side[..., None] for side in assignments))])
        headers.append(header)
    # What moved last varies slowest among the arrivals of a chunk.
    arrival = [axis for hop, _ in reversed(hops) for axis in hop.exchange]
    per_home = counts[..., :experts].sum(-1).permute(len(levels), *arrival).reshape(-1)
    per_expert = counts[..., :experts].sum(dim=list(levels)) if levels else counts

    wanted = [own, own_rows, sizes, headers, per_expert, per_home.sum(), hearsay[1]]
    own, own_rows, sizes, headers, per_expert, arriving, most_tokens = _to_host(wanted)
    for (_, channel), header in zip(hops, headers, strict=True):
        check_headers(header, channel, task)
    home = torch.arange(math.prod(grid.block), device=counts.device).view(grid.block).permute(arrival).reshape(-1)
    return Counts(
        own=own,
        own_rows=own_rows,
        hops=[HopCounts(send, recv, send_n[0], recv_n[0]) for send, recv, send_n, recv_n in sizes],
        per_expert=per_expert,
        home_n=home.repeat(counts.shape[-2]).repeat_interleave(per_home, output_size=arriving),
        most_tokens=most_tokens,
    )


def exchange_counts(
    counts: torch.Tensor, axes: Sequence[int], channel: Channel, task: str, status: torch.Tensor, hearsay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All-to-all along `axes`: the peers' counts, the hearsay with theirs, the peers' headers [peers, HEADER].

    Headers must be read, by `check_headers`, before the counts are used, but only when all hops have been walked:
    some ranks learn by hearsay alone, on the last one.
    """
    to_front, peers = list(range(len(axes))), len(channel.ranks)
    moved = counts.movedim(tuple(axes), to_front)
    mark = torch.full_like(status, zlib.crc32(task.encode()))
    header = torch.cat([mark[None], status[None], hearsay]).expand(peers, HEADER)
    message = torch.cat([header, moved.reshape(peers, -1)], dim=1)
    length = message.shape[1]
    room = _room(length)
    # NCCL wants to know exactly what comes.
    others = room if message.device.type == "cpu" else length
    rooms = [length if level == "own rank" else others for level in channel.levels]
    answer = channel.start(message.view(-1), [length] * peers, rooms, "counts", room).wait()
    received = torch.stack([message[:length] for message in answer.split(rooms)])

    ranks = from_host(channel.ranks, torch.int64, counts.device)
    odd = (received[:, 0] != mark) | (received[:, 1] != 0)
    trouble = torch.where(odd, (ranks + 1) * KINDS + received[:, 1], received[:, 2])
    heard = torch.stack([trouble, received[:, 3]], dim=1)
    hearsay = torch.cat([heard, hearsay[None]]).amax(0)
    return received[:, HEADER:].reshape(moved.shape).movedim(to_front, tuple(axes)), hearsay, received[:, :HEADER]


def check_headers(headers: list[list[int]], channel: Channel, task: str) -> None:
    """Raise a CommError that names the ranks, by their headers, in trouble or about to do anything but `task`."""
    mark = zlib.crc32(task.encode())
    by_rank = dict(zip(channel.ranks, headers, strict=True))
    statuses = {rank: status for rank, (_, status, *_) in by_rank.items() if status in STATUS}
    others = [rank for rank, (theirs, *_) in by_rank.items() if theirs != mark]
    hearsay = max(trouble for _, _, trouble, _ in by_rank.values())
    if hearsay and not statuses and not others:
        rank, status = hearsay // KINDS - 1, hearsay % KINDS
        statuses, others = ({rank: status}, []) if status in STATUS else ({}, [rank])
    problems = [f"rank {rank} {STATUS[status]}" for rank, status in statuses.items()]
    if others and not problems:
        problems = [f"ranks {others} are in trouble or disagree with this rank's {task}"]
    own = channel.topology.rank
    if problems and channel.topology.board is not None:
        if own in statuses:
            channel.topology.board.leave(f"{channel.place('counts')}: it {STATUS[statuses[own]]}", stopped=True)
        # All hear of it in their headers: to close connections that some still read would hide the reason.
        heard = give_up(channel.topology, f"{channel.place('counts')}, about to do {task}", at_once=False)
        error = NotFiniteError if NOT_FINITE in statuses.values() else CommError
        raise error(
            f"{channel.where}, counts: {'; '.join(problems)}. {heard} Every rank must run the same layers in the same "
            "order, on finite rows of the same shapes and dtypes."
        )


def _room(length: int) -> int:
    """The same for messages of about the same length."""
    room = LEAST_ROOM
    while room < length:
        room *= ROOM_FACTOR
    return room


def from_host(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Integers of the host on the device, which the host does not wait for."""
    on_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=on_cuda).to(device, non_blocking=on_cuda)


def _to_host(wanted: Any) -> Any:
    """Nested lists of tensors as nested lists of integers: the one host synchronisation of a dispatch."""
    tensors: list[torch.Tensor] = []

    def collect(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        else:
            for part in item:
                collect(part)

    collect(wanted)
    numbers = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if numbers.is_cuda:
        pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        pinned.copy_(numbers, non_blocking=True)
        torch.cuda.current_stream().synchronize()  # this stream alone: exchanges of other layers run on
        numbers = pinned
    on_host = iter(numbers.split([tensor.numel() for tensor in tensors]))

    def replace(item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            return next(on_host).view(item.shape).tolist()
        return [replace(part) for part in item]

    return replace(wanted)


def _without_repeats(rows: torch.Tensor, level: int) -> torch.Tensor:
    """Row counts of a level, [*block, chunks], without the inner dimensions along which they repeat."""
    for _ in range(rows.dim() - level - 2):
        rows = rows.select(level + 1, 0)
    return rows


def _by_chunk(counts: torch.Tensor) -> torch.Tensor:
    """[*block, chunks] -> [chunks]."""
    return counts.reshape(-1, counts.shape[-1]).sum(0)


def _by_peer(counts: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """[*block, chunks] -> [chunks, peers of an exchange along `axes`]."""
    others = [d for d in range(counts.dim() - 1) if d not in axes]
    total = counts.sum(dim=others) if others else counts
    return total.flatten(0, -2).T
