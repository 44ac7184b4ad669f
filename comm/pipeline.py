"""Dispatch, experts and combine of several chunks at once, forward and backward.

Each exchange is two autograd nodes, one that starts it and one that waits; the backward of waiting is to start the
reverse exchange, the backward of starting to wait for it. Autograd walks nodes in the reverse order of their
making, so a forward schedule that overlaps well runs backward as its mirror image and overlaps as well, and every
rank issues the collectives of a group in the same order, in both directions.

On CUDA each NCCL group has a stream of its own. Starting an exchange makes that stream wait, by an event, for the
copies issued so far on the current one; waiting makes the current stream wait for the exchange, and never the host.
Hops of different levels use different groups, hence run beside each other and beside the experts; memory of rows on
their way is kept by the group until its stream has passed them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from twohop.comm.clock import COMBINE, DISPATCH
from twohop.comm.exchange import Pending
from twohop.comm.plan import Chunk, Move, Plan
from twohop.comm.schedule import schedule
from twohop.comm.tree import Spread
from twohop.comm.wire import format_of
from twohop.comm.wiring import Direction, Wires

Phase = Callable[[str], AbstractContextManager[None]]
# (rows [R, D], rows of each expert) -> [R, D]; see `TokenDispatcher.plan` for counts that are a tensor
Experts = Callable[[torch.Tensor, Any], torch.Tensor]

BACKWARD = {Direction.dispatch: Direction.dispatch_backward, Direction.combine: Direction.combine_backward}


class _Transfer:
    """One exchange of rows, in its forward and its backward direction."""

    def __init__(self, move: Move, direction: Direction, wires: Wires) -> None:
        self.channel, self.direction, self.wires = move.channel, direction, wires
        self.there = (move.send_rows, move.recv_rows)
        if direction is Direction.combine:
            self.there = self.there[::-1]
        self.pending: Pending | None = None

    def start(self, rows: torch.Tensor, backward: bool) -> None:
        direction = BACKWARD[self.direction] if backward else self.direction
        send, recv = self.there[::-1] if backward else self.there
        self.dtype, self.wire = rows.dtype, format_of(self.wires, direction, self.channel.crosses_nodes)
        self.pending = self.channel.start(self.wire.encode(rows), send, recv, direction.value)

    def wait(self) -> torch.Tensor:
        assert self.pending is not None
        received, self.pending = self.pending.wait(), None
        return self.wire.decode(received, self.dtype)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Around a pause: activation checkpointing may stop a recomputation there and never come back."""
        try:
            yield
        except GeneratorExit:
            if self.pending is not None:
                self.pending.abandon()
            raise


class _Start(torch.autograd.Function):
    """rows -> an empty ticket; the rows are on their way. Their number changes on the way, hence the ticket."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, transfer: _Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        transfer.start(rows, backward=False)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.transfer.wait(), None


class _Wait(torch.autograd.Function):
    """ticket -> the rows that arrived."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, transfer: _Transfer) -> torch.Tensor:
        ctx.transfer = transfer
        return transfer.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.transfer.start(grad, backward=True)
        return grad.new_empty(0), None


class _Spread(torch.autograd.Function):
    """Copy rows to their children (down) or sum the children (up); each is the backward of the other."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, spread: Spread, up: bool, dtype: torch.dtype) -> torch.Tensor:
        ctx.spread, ctx.up, ctx.dtype = spread, up, rows.dtype
        return spread.up(rows, dtype=dtype) if up else spread.down(rows, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        spread = ctx.spread
        return spread.down(grad, ctx.dtype) if ctx.up else spread.up(grad, dtype=ctx.dtype), None, None, None


def copies_of(rows: torch.Tensor, spread: Spread, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[children, D] in `dtype` (None: that of the rows), differentiable: the backward adds up."""
    return _Spread.apply(rows, spread, False, dtype or rows.dtype)


def _up(rows: torch.Tensor, spread: Spread) -> torch.Tensor:
    return _Spread.apply(rows, spread, True, rows.dtype)


class _WeighAndSum(torch.autograd.Function):
    """Multiply the experts' rows by their combine weights and sum those of one token."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: torch.Tensor, weight_n: torch.Tensor, spread: Spread, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.spread = spread
        ctx.save_for_backward(rows_RD, weight_n)
        return spread.up(rows_RD, weight_n, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        rows_RD, weight_n = ctx.saved_tensors
        grads = ctx.spread.weighted_down(grad, rows_RD, weight_n, of_weights=ctx.needs_input_grad[1])
        return *grads, None, None


def weighed_sums(
    rows_RD: torch.Tensor, weight_n: torch.Tensor, spread: Spread, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[parents, D] in `dtype` (None: that of the rows), differentiable in both."""
    sums: torch.Tensor = _WeighAndSum.apply(rows_RD, weight_n, spread, dtype or rows_RD.dtype)
    return sums


class _GradientsHome:
    """Gradients of combine weights on their way home; the two ends of it in the graph share this."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.way: Iterator[torch.Tensor] = iter(())

    def start(self, grad_n: torch.Tensor) -> None:
        way = self.plan.assignments_home(grad_n.contiguous(), "metadata backward")
        self.way = chain([next(way)], way)

    def wait(self) -> torch.Tensor:
        return last(self.way)


class _WeightsLeave(torch.autograd.Function):
    """Combine weights [N, K] -> an empty ticket; the plan has brought them along already."""

    @staticmethod
    def forward(ctx: Any, weights_NK: torch.Tensor, home: _GradientsHome) -> torch.Tensor:
        ctx.home, ctx.like = home, (weights_NK.shape, weights_NK.dtype)
        return weights_NK.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ticket: torch.Tensor) -> tuple[torch.Tensor, None]:
        shape, dtype = ctx.like
        return ctx.home.wait().view(shape).to(dtype), None


class _WeightsArrive(torch.autograd.Function):
    """ticket -> the weights of the assignments that arrived."""

    @staticmethod
    def forward(ctx: Any, ticket: torch.Tensor, home: _GradientsHome) -> torch.Tensor:
        ctx.home = home
        return home.plan.weight_n.view_as(home.plan.weight_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_n: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.home.start(grad_n)
        return grad_n.new_empty(0), None


class CombineWeights:
    """The combine weights that a plan has brought here, differentiable in `weights_NK`, if given.

    Autograd walks nodes in the reverse order of their making. The one that sends the gradients is made when the weights
    are first used, after the experts, and the one that waits for them now: so they travel beside the experts' backward.
    """

    def __init__(self, weights_NK: torch.Tensor | None, plan: Plan) -> None:
        self.plan, self._home = plan, _GradientsHome(plan)
        self._ticket = None if weights_NK is None else _WeightsLeave.apply(weights_NK, self._home)

    @cached_property
    def of_chunks(self) -> tuple[torch.Tensor, ...]:
        """Those of each chunk, in order of arrival."""
        weight_n = self.plan.weight_n if self._ticket is None else _WeightsArrive.apply(self._ticket, self._home)
        return weight_n.split([chunk.num_assignments for chunk in self.plan.chunks])


def way_there(
    tokens: torch.Tensor, chunk: Chunk, wires: Wires, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """A chunk's tokens to its experts; yields once after every start of an exchange and last the experts' rows.

    These are rounded to `dtype` (None: as they are) as they are copied.
    """
    rows = tokens
    for move in chunk.moves:
        transfer = _Transfer(move, Direction.dispatch, wires)
        ticket = _Start.apply(copies_of(rows, move.spread), transfer)
        del rows  # this frame is alive as long as the chunk is on its way
        with transfer.under_way():
            yield ticket
        rows = _Wait.apply(ticket, transfer)
    rows = copies_of(rows, chunk.to_experts, dtype)
    yield rows


def way_home(
    rows_RD: torch.Tensor, weight_n: torch.Tensor, chunk: Chunk, wires: Wires, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """The experts' rows of a chunk home; yields once after every start of an exchange and last the tokens' sums.

    All sums have `dtype` (None: that of the rows).
    """
    rows = weighed_sums(rows_RD, weight_n, chunk.to_experts, dtype)
    for move in reversed(chunk.moves):
        transfer = _Transfer(move, Direction.combine, wires)
        ticket = _Start.apply(rows, transfer)
        del rows
        with transfer.under_way():
            yield ticket
        rows = _up(_Wait.apply(ticket, transfer), move.spread)
    yield rows


def last(way: Iterator[torch.Tensor]) -> torch.Tensor:
    """Walk a way to its end without doing anything beside it."""
    *_, rows = way
    return rows


def run(
    tokens_ND: torch.Tensor,
    weights_NK: torch.Tensor | None,
    plan: Plan,
    wires: Wires,
    experts: Experts,
    beside: Callable[[], Any] | None,
    phase: Phase,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, Any]:
    """Tokens through the experts and home [N, D], chunk by chunk; `beside` runs while the first hops are under way.

    The experts get rows in `dtype`; their sums have that of the tokens.
    What is done for dispatch and for combine is done inside `phase(DISPATCH)` and `phase(COMBINE)`.
    """
    weights = CombineWeights(weights_NK, plan)
    tokens = tokens_ND.split([chunk.num_tokens for chunk in plan.chunks])
    ways = [_through(rows, weights, number, wires, experts, phase, dtype) for number, rows in enumerate(tokens)]
    done: list[torch.Tensor] = list(tokens)
    num_hops = len(plan.chunks[0].moves)
    turns = schedule(num_hops, len(plan.chunks))
    starts = len(ways) if num_hops else 0  # without a hop the first stage is already that of the experts
    first_hops, rest = turns[:starts], turns[starts:]
    for _, chunk in first_hops:
        done[chunk] = next(ways[chunk])
    beside_output = None if beside is None else beside()
    for _, chunk in rest:
        done[chunk] = next(ways[chunk])
    return torch.cat(done) if len(done) > 1 else done[0], beside_output


def _through(
    tokens: torch.Tensor,
    weights: CombineWeights,
    number: int,
    wires: Wires,
    experts: Experts,
    phase: Phase,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    chunk = weights.plan.chunks[number]
    there = way_there(tokens, chunk, wires, dtype)
    for _ in chunk.moves:
        with phase(DISPATCH):
            ticket = next(there)
        yield ticket
    with phase(DISPATCH):
        rows_RD = next(there)
    expert_rows_RD = experts(rows_RD, chunk.counts)
    home = way_home(expert_rows_RD, weights.of_chunks[number], chunk, wires, tokens.dtype)
    for _ in (*chunk.moves, None):
        with phase(COMBINE):
            rows = next(home)
        yield rows
