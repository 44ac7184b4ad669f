"""Who sends which rows where: the plan of one dispatch.

Shapes: N tokens of this rank, K experts per token, n assignments (token, expert) alive at this point of the way,
C rows sent on a hop, R rows at this rank's experts, E experts.

Tokens are cut into chunks that travel one after the other. At every point of the way rows stand by chunk first, so
that the plan of a chunk is a slice of the plan of all. Assignments travel beside the rows, all chunks at once, as
(code, weight) pairs: code = 2 · (chunks · expert + chunk) + "opens a new row".
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from twohop.comm.counts import Counts, Grid, HopCounts, agree
from twohop.comm.exchange import Channel
from twohop.comm.routes import Hop
from twohop.comm.tree import Bag, Spread, inverse


@dataclass
class Assignments:
    """(row, expert, weight) triples, grouped by row and, inside a row, by ascending expert; rows by chunk first."""

    row_n: torch.Tensor
    expert_n: torch.Tensor
    chunk_n: torch.Tensor
    weight_n: torch.Tensor


@dataclass(frozen=True)
class Move:
    """A hop of one chunk with everything decided."""

    channel: Channel
    spread: Spread
    send_rows: list[int]
    recv_rows: list[int]


@dataclass(frozen=True)
class Chunk:
    """The way of one chunk of tokens to its experts; walked backwards, of their results."""

    num_tokens: int
    moves: tuple[Move, ...]
    to_experts: Spread  # from the rows that arrived to the experts' rows, by expert, home rank, token
    num_assignments: int  # that arrive; their weights are summed with their rows, in order of arrival
    counts: list[int] | torch.Tensor  # rows of each local expert; a tensor: int64, on the device


@dataclass(frozen=True)
class AssignmentMove:
    """A hop of the assignments, all chunks together."""

    channel: Channel
    sending_n: torch.Tensor  # order in which they are sent
    arriving_n: torch.Tensor  # arrivals by chunk
    send: list[int]
    recv: list[int]


@dataclass(frozen=True)
class Plan:
    """The way of one dispatch and, walked backwards, of its combine."""

    chunks: tuple[Chunk, ...]
    assignment_moves: tuple[AssignmentMove, ...]
    weight_n: torch.Tensor  # combine weights of the assignments that arrived, by chunk, in order of arrival
    slot_n: torch.Tensor  # this rank's own assignments: index into the flattened [N, K] ids
    num_slots: int
    most_tokens: int  # of any rank of the group

    def assignments_home(self, value_n: torch.Tensor, phase: str) -> Iterator[torch.Tensor]:
        """One value for each assignment that arrived, home to the slots [N * K] that caused them; 0 elsewhere.

        Yields once after every start of an exchange, and last the values.
        """
        for move in reversed(self.assignment_moves):
            arrived_n = torch.empty_like(value_n).index_copy_(0, move.arriving_n, value_n)
            pending = move.channel.start(arrived_n, move.recv, move.send, phase)
            yield arrived_n
            sent_n = pending.wait()
            value_n = torch.empty_like(sent_n).index_copy_(0, move.sending_n, sent_n)
        yield value_n.new_zeros(self.num_slots).index_copy_(0, self.slot_n, value_n)

    def kept(self, number: int) -> "Plan":
        """The plan to be walked again without an agreement, as plan `number`, which is the same on all ranks.

        The number is in the label, hence in the tag of every message: a rank that walks another plan, or none, is
        never heard in its place. What only the gradients of weights need is left out.
        """

        def again(move: Move) -> Move:
            label = f"{move.channel.label}, plan {number} again".removeprefix(", ")
            return replace(move, channel=replace(move.channel, label=label))

        chunks = tuple(replace(chunk, moves=tuple(map(again, chunk.moves))) for chunk in self.chunks)
        return replace(self, chunks=chunks, assignment_moves=(), slot_n=self.slot_n.new_empty(0))


def make_plan(
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    grid: Grid,
    hops: Sequence[tuple[Hop, Channel]],
    task: str,
    num_chunks: int,
    status: torch.Tensor,
    counts_on_device: bool = False,
) -> Plan:
    """Agree with the group on all counts, move the assignments, and decide every copy of every row.

    Args:
        expert_ids_NK: int64 experts of each token; a negative id is a dropped assignment.
        weights_NK: combine weights, fp32 or fp64.
        grid: numbering of the group's experts and ranks.
        hops: the route; every rank of the group must call with the same one, as with num_chunks.
        task: what this rank is about to do; ranks that are about to do something else are found out here.
        status: int64 scalar, see `twohop.comm.counts`.
        counts_on_device: without a hop nothing has to be agreed on, so one chunk is planned without waiting for the
            device: `Chunk.counts` is a tensor, and the experts have a row for every slot, dropped ones last.
    """
    if counts_on_device and not hops:
        return _plan_alone(expert_ids_NK, weights_NK, grid.num_experts)
    tokens = _chunk_sizes(len(expert_ids_NK), num_chunks)
    own, slot_n = _own_assignments(expert_ids_NK, weights_NK, grid.num_experts, tokens)
    counts = agree(_count(own, grid, num_chunks), grid, hops, task, status, len(expert_ids_NK))
    alive = slice(counts.own)
    assignments = Assignments(own.row_n[alive], own.expert_n[alive], own.chunk_n[alive], own.weight_n[alive])

    assignment_moves, moves_by_hop = [], []
    rows = tokens  # rows of each chunk at this point of the way
    for (hop, channel), sizes in zip(hops, counts.hops, strict=True):
        # Only the first hop can spread on several levels, and there the rows are this rank's own.
        children = [*(counts.own_rows[level] for level in hop.spread[:-1]), [sum(chunk) for chunk in sizes.send_rows]]
        spread, peer_n, code_n = _spread(assignments, sum(rows), hop, grid, children, num_chunks)
        parts = _cut(spread, rows, children if hop.spread else [rows])
        moves_by_hop.append(
            [Move(channel, part, sizes.send_rows[c], sizes.recv_rows[c]) for c, part in enumerate(parts)]
        )
        assignments, move = _move(code_n, peer_n, assignments.weight_n, channel, sizes, num_chunks)
        assignment_moves.append(move)
        rows = [sum(chunk) for chunk in sizes.recv_rows]

    to_experts = _cut(_to_experts(assignments, sum(rows), grid, counts), rows, [[sum(c) for c in counts.per_expert]])
    chunks = tuple(
        Chunk(tokens[c], tuple(moves[c] for moves in moves_by_hop), to_experts[c], sum(per_expert), per_expert)
        for c, per_expert in enumerate(counts.per_expert)
    )
    return Plan(
        chunks=chunks,
        assignment_moves=tuple(assignment_moves),
        weight_n=assignments.weight_n,
        slot_n=slot_n[alive],
        num_slots=expert_ids_NK.numel(),
        most_tokens=counts.most_tokens,
    )


def _plan_alone(expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, num_experts: int) -> Plan:
    """The plan of a rank that has all experts; see `make_plan`. All sizes are known: no value is read on the host."""
    num_tokens = len(expert_ids_NK)
    own, slot_n = _own_assignments(expert_ids_NK, weights_NK, num_experts, [num_tokens])
    dropped_n = own.expert_n < 0
    expert_n = own.expert_n.masked_fill(dropped_n, num_experts)
    sending_R = expert_n.argsort(stable=True)
    # Dropped assignments stand last in the bag as well, as children of one more parent, which is then left out.
    bag = Bag.from_parents(own.row_n.masked_fill(dropped_n, num_tokens), inverse(sending_R), num_tokens + 1)
    to_experts = Spread(own.row_n.index_select(0, sending_R), (Bag(bag.children_C, bag.offsets[:-1]),))
    counts_E = expert_n.new_zeros(num_experts + 1).scatter_add_(0, expert_n, torch.ones_like(expert_n))[:-1]
    chunk = Chunk(num_tokens, (), to_experts, len(expert_n), counts_E)
    return Plan((chunk,), (), own.weight_n, slot_n, len(slot_n), num_tokens)


def _chunk_sizes(num_tokens: int, chunks: int) -> list[int]:
    """Tokens of each chunk, consecutive and as equal as can be."""
    bounds = [num_tokens * c // chunks for c in range(chunks + 1)]
    return [end - start for start, end in pairwise(bounds)]


def _own_assignments(
    ids_NK: torch.Tensor, weights_NK: torch.Tensor, num_experts: int, tokens: list[int]
) -> tuple[Assignments, torch.Tensor]:
    """All N * K slots sorted by (token, expert), dropped ones last; sorting needs no host synchronisation."""
    n, k = ids_NK.shape
    token_n = torch.arange(n, device=ids_NK.device).repeat_interleave(k)
    chunk_of_token = torch.cat([token_n.new_full((size,), chunk) for chunk, size in enumerate(tokens)])
    ids_n = ids_NK.reshape(-1)
    slot_n = torch.where(ids_n >= 0, token_n * num_experts + ids_n, n * num_experts).argsort(stable=True)
    row_n = token_n[slot_n]
    return Assignments(row_n, ids_n[slot_n], chunk_of_token[row_n], weights_NK.reshape(-1)[slot_n]), slot_n


def _opens(row_n: torch.Tensor, subtree_n: torch.Tensor) -> torch.Tensor:
    """Whether an assignment is the first of its (row, subtree)."""
    opens_n = torch.ones_like(row_n, dtype=torch.bool)
    opens_n[1:] = (row_n[1:] != row_n[:-1]) | (subtree_n[1:] != subtree_n[:-1])
    return opens_n


def _count(own: Assignments, grid: Grid, num_chunks: int) -> torch.Tensor:
    """What this rank sends, by destination, as `twohop.comm.counts.agree` takes it."""
    alive_n = own.expert_n >= 0
    expert_n = own.expert_n.clamp(min=0)

    def tally(place_n: torch.Tensor, places: int, weight_n: torch.Tensor) -> torch.Tensor:
        """[places, chunks]."""
        total = place_n.new_zeros(places * num_chunks)
        return total.scatter_add_(0, place_n * num_chunks + own.chunk_n, weight_n.long()).view(places, num_chunks)

    per_expert = tally(expert_n, grid.num_experts, alive_n).view(*grid.block, grid.experts_per_rank, num_chunks)
    features = [per_expert.transpose(-1, -2)]
    for level in range(len(grid.block)):
        subtree_n = grid.subtree(expert_n, level)
        shape = grid.block[: level + 1]
        rows = tally(subtree_n, math.prod(shape), _opens(own.row_n, subtree_n) & alive_n)
        inner = len(grid.block) - len(shape)
        features.append(rows.view(*shape, *[1] * inner, num_chunks, 1).expand(*grid.block, num_chunks, 1))
    return torch.cat(features, dim=-1)


def _spread(
    assignments: Assignments, num_rows: int, hop: Hop, grid: Grid, children: list[list[int]], num_chunks: int
) -> tuple[Spread, torch.Tensor, torch.Tensor]:
    """Copies of a hop's rows by (chunk, peer), and for each assignment its peer and its code."""
    row_n, expert_n = assignments.row_n, assignments.expert_n
    gather_C = torch.arange(num_rows, device=row_n.device)
    bags: list[Bag] = []
    for level, sizes in zip(hop.spread, children, strict=bool(hop.spread)):
        child_n = _opens(row_n, grid.subtree(expert_n, level)).cumsum(0) - 1
        # Every assignment of a child writes the same row, so the scatter is deterministic.
        parent_C = row_n.new_empty(sum(sizes)).scatter_(0, child_n, row_n)
        bags.insert(0, Bag.from_parents(parent_C, torch.arange(len(parent_C), device=row_n.device), num_rows))
        gather_C = gather_C.index_select(0, parent_C)
        row_n, num_rows = child_n, len(parent_C)

    peer_n = grid.peer(expert_n, hop.exchange)
    place_n = assignments.chunk_n * math.prod(grid.block) + peer_n
    sending_C = place_n.new_empty(num_rows).scatter_(0, row_n, place_n).argsort(stable=True)
    place_C = inverse(sending_C)
    if bags:  # the innermost children are summed from where they were sent
        bags[0] = Bag(place_C, bags[0].offsets)
    else:
        bags = [Bag.from_parents(gather_C, place_C, num_rows)]
    code_n = 2 * (expert_n * num_chunks + assignments.chunk_n) + _opens(row_n, row_n)
    return Spread(gather_C.index_select(0, sending_C), tuple(bags)), peer_n, code_n


def _move(
    code_n: torch.Tensor,
    peer_n: torch.Tensor,
    weight_n: torch.Tensor,
    channel: Channel,
    sizes: HopCounts,
    num_chunks: int,
) -> tuple[Assignments, AssignmentMove]:
    """Send the assignments along a hop, as pairs of integers as wide as a weight."""
    integer = torch.int32 if weight_n.dtype == torch.float32 else torch.int64
    sending_n = peer_n.argsort(stable=True)
    pair_n2 = torch.stack([code_n.to(integer), weight_n.view(integer)], dim=1).index_select(0, sending_n)
    pair_n2 = channel.start(pair_n2, sizes.send_assignments, sizes.recv_assignments, "metadata").wait()
    arriving_n = (pair_n2[:, 0] // 2 % num_chunks).argsort(stable=True)
    pair_n2 = pair_n2.index_select(0, arriving_n)
    code_n, weight_n = pair_n2[:, 0].long(), pair_n2[:, 1].contiguous().view(weight_n.dtype)
    expert_n, chunk_n = code_n // 2 // num_chunks, code_n // 2 % num_chunks
    move = AssignmentMove(channel, sending_n, arriving_n, sizes.send_assignments, sizes.recv_assignments)
    return Assignments((code_n % 2).cumsum(0) - 1, expert_n, chunk_n, weight_n), move


def _to_experts(arrived: Assignments, num_rows: int, grid: Grid, counts: Counts) -> Spread:
    """Arrivals stand by chunk and sender; a stable sort by expert and home rank keeps a home's tokens in order."""
    local_n = arrived.chunk_n * grid.experts_per_rank + arrived.expert_n % grid.experts_per_rank
    sending_R = (local_n * math.prod(grid.block) + counts.home_n).argsort(stable=True)
    bag = Bag.from_parents(arrived.row_n, inverse(sending_R), num_rows)
    return Spread(arrived.row_n.index_select(0, sending_R), (bag,))


def _cut(spread: Spread, rows: list[int], children: list[list[int]]) -> list[Spread]:
    """A spread of all chunks as one for each; rows and children (outermost level first) of each chunk are given."""
    if len(rows) == 1:
        return [spread]
    levels = [[0, *accumulate(sizes)] for sizes in (rows, *children)]  # bounds of chunks among rows of each level
    parts = []
    for c in range(len(rows)):
        spans = [(bounds[c], bounds[c + 1]) for bounds in levels]
        bags = [
            bag.part(parents, inner)
            for bag, parents, inner in zip(reversed(spread.bags), spans[:-1], spans[1:], strict=True)
        ]
        gather_C = spread.gather_C[slice(*spans[-1])] - spans[0][0]
        parts.append(Spread(gather_C, tuple(reversed(bags))))
    return parts
