"""Who sends which rows where: the plan of one dispatch, made from one exchange of counts.

Shapes: N tokens of this rank, K experts per token, n assignments (token, expert) alive at this point of the way,
C rows sent, R rows at this rank's experts, E experts, P ranks of the EP group.

A token's experts form a tree: token -> nodes -> ranks -> experts. A *route* walks it in hops; each hop first
spreads rows to their children on some levels, then exchanges them along some axes of the EP group's grid:

    flat          spread to nodes and ranks, exchange among all
    hierarchical  spread to nodes and ranks, exchange inside the node by local rank, then between nodes
    dedup         spread to nodes, exchange between nodes, spread to ranks, exchange inside the node

Assignments travel beside the rows, as one (code, weight) pair each: code = 2 · expert + "opens a new row".
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from twohop.comm.errors import CommError
from twohop.comm.exchange import Channel
from twohop.comm.tree import Bag, Spread, inverse


@dataclass(frozen=True)
class Hop:
    """One hop of a route, by axis number (0 is the outermost level of the EP group)."""

    spread: tuple[int, ...]  # levels on which rows are copied to their children, before ...
    exchange: tuple[int, ...]  # ... they move along these axes
    channel: Channel


@dataclass(frozen=True)
class Grid:
    """How experts and ranks of an EP group are numbered: expert -> rank -> coordinates, all in nested order."""

    block: tuple[int, ...]  # ranks along each axis
    num_experts: int

    @property
    def experts_per_rank(self) -> int:
        """Experts on each rank of the group."""
        return self.num_experts // math.prod(self.block)

    def subtree(self, expert_n: torch.Tensor, axis: int) -> torch.Tensor:
        """Number of the subtree, down to level `axis`, that an expert lives in."""
        return expert_n // (self.experts_per_rank * math.prod(self.block[axis + 1 :]))

    def peer(self, expert_n: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
        """Number of the peer towards the expert's rank, in the group that spans consecutive `axes`."""
        return self.subtree(expert_n, axes[-1]) % math.prod(self.block[axis] for axis in axes)


@dataclass
class Assignments:
    """(row, expert, weight) triples, grouped by row and, inside a row, by ascending expert."""

    row_n: torch.Tensor
    expert_n: torch.Tensor
    weight_n: torch.Tensor


@dataclass(frozen=True)
class Step:
    """A hop with everything decided."""

    channel: Channel
    spread: Spread
    order_n: torch.Tensor  # order in which assignments are sent
    send_rows: list[int]
    recv_rows: list[int]
    send_assignments: list[int]
    recv_assignments: list[int]


@dataclass(frozen=True)
class Plan:
    """The way of one dispatch and, walked backwards, of its combine."""

    steps: tuple[Step, ...]
    to_experts: Spread  # from the rows that arrived to the rows of the experts
    order_R: torch.Tensor  # assignment that arrived -> place among the experts' rows
    weight_n: torch.Tensor  # combine weights of the assignments that arrived
    slot_n: torch.Tensor  # this rank's own assignments: index into the flattened [N, K] ids
    num_slots: int
    counts: list[int]  # rows of each local expert

    def down(self, rows_ND: torch.Tensor, phase: str) -> torch.Tensor:
        """Tokens [N, D] to their experts: [R, D], grouped by expert, inside one by home rank, then token."""
        for step in self.steps:
            rows_ND = step.channel.exchange(step.spread.down(rows_ND), step.send_rows, step.recv_rows, phase)
        return self.to_experts.down(rows_ND)

    def up(self, rows_RD: torch.Tensor, phase: str, weight_n: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the experts [R, D] home: [N, D], summed over experts of a rank, ranks of a node, nodes."""
        rows = self.to_experts.up(rows_RD, weight_n)
        for step in reversed(self.steps):
            rows = step.spread.up(step.channel.exchange(rows, step.recv_rows, step.send_rows, phase))
        return rows

    def assignments_up(self, value_R: torch.Tensor, phase: str) -> torch.Tensor:
        """One value for each of the experts' rows, home to the slots [N * K] that caused them; 0 elsewhere."""
        value_n = value_R.index_select(0, self.order_R)
        for step in reversed(self.steps):
            sent_n = step.channel.exchange(value_n, step.recv_assignments, step.send_assignments, phase)
            value_n = torch.empty_like(sent_n).index_copy_(0, step.order_n, sent_n)
        return value_n.new_zeros(self.num_slots).index_copy_(0, self.slot_n, value_n)


def make_plan(
    expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, grid: Grid, hops: Sequence[Hop], task: str
) -> Plan:
    """Agree with the group on all counts, move the assignments, and decide every copy of every row.

    Args:
        expert_ids_NK: int64 experts of each token; a negative id is a dropped assignment.
        weights_NK: combine weights, fp32 or fp64.
        grid: numbering of the group's experts and ranks.
        hops: the route; every rank of the group must call with the same one.
        task: what this rank is about to do; ranks that are about to do something else are found out here.
    """
    own, slot_n = _own_assignments(expert_ids_NK, weights_NK, grid.num_experts)
    counts = _walk_counts(_count(own, expert_ids_NK, grid), grid, hops, task)
    own = Assignments(*(field[: counts.own] for field in (own.row_n, own.expert_n, own.weight_n)))

    steps, assignments, num_rows = [], own, len(expert_ids_NK)
    for i, hop in enumerate(hops):
        # Only the first hop can spread on several levels, and there the rows are this rank's own.
        children = [*(counts.own_rows[level] for level in hop.spread[:-1]), sum(counts.splits[i][0])]
        spread, order_n, code_n = _spread(assignments, num_rows, hop, grid, children)
        step = Step(hop.channel, spread, order_n, *counts.splits[i])
        assignments = _move(code_n, assignments.weight_n.index_select(0, order_n), step)
        num_rows = sum(step.recv_rows)
        steps.append(step)

    # Arrivals stand by sender; a stable sort by (expert, home rank) keeps the tokens of a home in order.
    sorting_key = (assignments.expert_n % grid.experts_per_rank) * math.prod(grid.block) + counts.home_n
    arrival_R = sorting_key.argsort(stable=True)
    order_R = inverse(arrival_R)
    bag = Bag.from_parents(assignments.row_n, order_R, num_rows)
    to_experts = Spread(assignments.row_n.index_select(0, arrival_R), (bag,))
    return Plan(
        tuple(steps),
        to_experts,
        order_R,
        assignments.weight_n,
        slot_n[: counts.own],
        expert_ids_NK.numel(),
        counts.per_expert,
    )


def _own_assignments(
    ids_NK: torch.Tensor, weights_NK: torch.Tensor, num_experts: int
) -> tuple[Assignments, torch.Tensor]:
    """All N * K slots sorted by (token, expert), dropped ones last; sorting needs no host synchronisation."""
    k = ids_NK.shape[1]
    token_n = torch.arange(len(ids_NK), device=ids_NK.device).repeat_interleave(k)
    ids_n = ids_NK.reshape(-1)
    key_n = torch.where(ids_n >= 0, token_n * num_experts + ids_n, len(ids_NK) * num_experts)
    slot_n = key_n.argsort(stable=True)
    return Assignments(token_n[slot_n], ids_n[slot_n], weights_NK.reshape(-1)[slot_n]), slot_n


def _opens(row_n: torch.Tensor, subtree_n: torch.Tensor) -> torch.Tensor:
    """Whether an assignment is the first of its (row, subtree)."""
    opens_n = torch.ones_like(row_n, dtype=torch.bool)
    opens_n[1:] = (row_n[1:] != row_n[:-1]) | (subtree_n[1:] != subtree_n[:-1])
    return opens_n


def _count(own: Assignments, ids_NK: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What this rank sends, by destination: int64 [*block, experts_per_rank + levels].

    The first entries count assignments of each expert of the destination; entry experts_per_rank + i counts the
    distinct (token, subtree) pairs of level i, the same number for all destinations inside that subtree.
    """
    alive_n = own.expert_n >= 0
    expert_n = own.expert_n.clamp(min=0)
    per_expert = expert_n.new_zeros(grid.num_experts).scatter_add_(0, expert_n, alive_n.long())
    features = [per_expert.view(*grid.block, grid.experts_per_rank)]
    for level in range(len(grid.block)):
        subtree_n = grid.subtree(expert_n, level)
        opens_n = _opens(own.row_n, subtree_n) & alive_n
        shape = grid.block[: level + 1]
        rows = expert_n.new_zeros(math.prod(shape)).scatter_add_(0, subtree_n, opens_n.long())
        inner = len(grid.block) - len(shape)
        features.append(rows.view(*shape, *[1] * inner, 1).expand(*grid.block, 1))
    return torch.cat(features, dim=-1)


@dataclass(frozen=True)
class Counts:
    """Everything about sizes that a rank must know, as host integers."""

    own: int  # assignments of this rank's tokens
    own_rows: list[int]  # for each level, (token, subtree) pairs of this rank's tokens
    splits: list[list[list[int]]]  # for each hop: rows sent, rows received, assignments sent, assignments received
    per_expert: list[int]
    home_n: torch.Tensor  # home rank of each assignment that arrives, in order of arrival


def _walk_counts(counts: torch.Tensor, grid: Grid, hops: Sequence[Hop], task: str) -> Counts:
    """Send the counts along the route: an exchange along an axis turns its destinations into sources."""
    experts, dims = grid.experts_per_rank, list(range(len(grid.block)))
    wanted = [counts[..., :experts].sum()]
    wanted += [_without_repeats(counts[..., experts + level], level).sum() for level in dims]
    level = -1  # the deepest level spread so far: a row is a (token, subtree of this level) pair
    for hop in hops:
        level = max((level, *hop.spread))
        received, marks = _exchange_counts(counts, hop, task)
        wanted += [_by_peer(_without_repeats(c[..., experts + level], level), hop.exchange) for c in (counts, received)]
        wanted += [_by_peer(c[..., :experts].sum(-1), hop.exchange) for c in (counts, received)]
        wanted.append(marks)
        counts = received
    # What moved last varies slowest among the arrivals.
    arrival = [axis for hop in reversed(hops) for axis in hop.exchange]
    per_home = counts[..., :experts].sum(-1).permute(arrival).reshape(-1)
    wanted += [counts[..., :experts].sum(dim=dims) if dims else counts, per_home.sum()]

    own, *rest = _to_host(wanted)
    per_hop = [rest[len(dims) + 5 * i : len(dims) + 5 * i + 5] for i in range(len(hops))]
    for hop, (*_, marks_seen) in zip(hops, per_hop, strict=True):
        _check_marks(marks_seen, hop.channel, task)
    home = torch.arange(math.prod(grid.block), device=counts.device).view(grid.block).permute(arrival).reshape(-1)
    return Counts(
        own=own[0],
        own_rows=[part[0] for part in rest[: len(dims)]],
        splits=[part[:4] for part in per_hop],
        per_expert=rest[-2],
        home_n=home.repeat_interleave(per_home, output_size=rest[-1][0]),
    )


def _to_host(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Each tensor as a list of integers: the one host synchronisation of a dispatch."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist()
    ends = list(accumulate(tensor.numel() for tensor in tensors))
    return [flat[end - tensor.numel() : end] for tensor, end in zip(tensors, ends, strict=True)]


def _without_repeats(rows: torch.Tensor, level: int) -> torch.Tensor:
    """Row counts of a level without the inner dimensions along which they repeat."""
    return rows[(..., *[0] * (rows.dim() - level - 1))]


def _by_peer(counts: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Totals for each peer of an exchange along `axes`."""
    others = [d for d in range(counts.dim()) if d not in axes]
    return (counts.sum(dim=others) if others else counts).reshape(-1)


def _exchange_counts(counts: torch.Tensor, hop: Hop, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All-to-all of the counts along the hop's axes; also every peer's fingerprint of what it is about to do."""
    to_front, peers = list(range(len(hop.exchange))), len(hop.channel.ranks)
    moved = counts.movedim(hop.exchange, to_front)
    mark = counts.new_full((peers, 1), _fingerprint(task))
    message = torch.cat([mark, moved.reshape(peers, -1)], dim=1)
    received = hop.channel.exchange(message, [1] * peers, [1] * peers, "counts")
    return received[:, 1:].reshape(moved.shape).movedim(to_front, hop.exchange), received[:, 0]


def _fingerprint(task: str) -> int:
    return zlib.crc32(task.encode())


def _check_marks(marks: list[int], channel: Channel, task: str) -> None:
    others = [rank for rank, mark in zip(channel.ranks, marks, strict=True) if mark != _fingerprint(task)]
    if others:
        raise CommError(
            f"{channel.where}: ranks {others} are about to do something else than this rank's {task}; "
            "every rank must run the same layers in the same order, on the same shapes and dtypes"
        )


def _spread(
    assignments: Assignments, num_rows: int, hop: Hop, grid: Grid, children: list[int]
) -> tuple[Spread, torch.Tensor, torch.Tensor]:
    """Copies and sending order of a hop's rows, sending order and codes of its assignments."""
    row_n, expert_n = assignments.row_n, assignments.expert_n
    gather_C = torch.arange(num_rows, device=row_n.device)
    bags: list[Bag] = []
    for level, num_children in zip(hop.spread, children, strict=bool(hop.spread)):
        child_n = _opens(row_n, grid.subtree(expert_n, level)).cumsum(0) - 1
        # Every assignment of a child writes the same row, so the scatter is deterministic.
        parent_C = row_n.new_empty(num_children).scatter_(0, child_n, row_n)
        bags.insert(0, Bag.from_parents(parent_C, torch.arange(num_children, device=row_n.device), num_rows))
        gather_C = gather_C.index_select(0, parent_C)
        row_n, num_rows = child_n, num_children

    peer_n = grid.peer(expert_n, hop.exchange)
    peer_C = peer_n.new_empty(num_rows).scatter_(0, row_n, peer_n)
    sending_C, sending_n = peer_C.argsort(stable=True), peer_n.argsort(stable=True)
    place_C = inverse(sending_C)
    if bags:  # the innermost children are summed from where they were sent
        bags[0] = Bag(place_C, bags[0].offsets)
    else:
        bags = [Bag.from_parents(gather_C, place_C, num_rows)]
    code_n = 2 * expert_n + _opens(row_n, row_n)
    return Spread(gather_C.index_select(0, sending_C), tuple(bags)), sending_n, code_n.index_select(0, sending_n)


def _move(code_n: torch.Tensor, weight_n: torch.Tensor, step: Step) -> Assignments:
    """Send assignments along a hop, as pairs of integers as wide as a weight."""
    integer = torch.int32 if weight_n.dtype == torch.float32 else torch.int64
    pair_n2 = torch.stack([code_n.to(integer), weight_n.view(integer)], dim=1)
    pair_n2 = step.channel.exchange(pair_n2, step.send_assignments, step.recv_assignments, "metadata")
    code_n, weight_n = pair_n2[:, 0].long(), pair_n2[:, 1].contiguous().view(weight_n.dtype)
    return Assignments((code_n % 2).cumsum(0) - 1, code_n // 2, weight_n)
