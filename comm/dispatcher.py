"""Token dispatchers: carry tokens to the ranks of their experts, and the experts' results home.

`auto` chooses among the others by a cost model, again when the shapes change.
`flat`, `hierarchical` and `dedup` differ in their route alone (see `twohop.comm.routes`); with the fp32 wire,
outputs and all gradients are the same to the bit.
Shapes: N tokens, D width, K experts per token, R rows at this rank's experts.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from twohop.comm.clock import COMBINE, DISPATCH, EXPERTS, PhaseClock
from twohop.comm.counts import NOT_FINITE, WRONG_EXPERTS, Grid
from twohop.comm.diagnose import announce_failure
from twohop.comm.kernels import fused
from twohop.comm.pipeline import CombineWeights, Experts, last, run, way_home, way_there
from twohop.comm.plan import Plan, make_plan
from twohop.comm.topology import Topology
from twohop.comm.way import Chooser, Way


@dataclass(frozen=True)
class Planned:
    """A plan that the EP group has agreed on, and what it carries."""

    way: Way
    plan: Plan
    number: int  # among this dispatcher's plans, hence the same on all ranks
    tokens_like: tuple[torch.Size, torch.dtype]  # of the tokens that it is for
    weights_NK: torch.Tensor | None  # gets the gradient of the combine weights; None: they are constants

    def kept(self) -> "Planned":
        """The same plan for further calls of `follow`, with the combine weights as they are now.

        Holds no graph and none of the rows. No communication, but every rank must keep, and follow, the same plans.
        """
        return replace(self, plan=self.plan.kept(self.number), weights_NK=None)


@dataclass(frozen=True)
class Dispatched:
    """Tokens at their experts."""

    rows: torch.Tensor  # [R, D], grouped by local expert; inside one by home rank, then token
    counts: list[int]  # rows of each local expert, on the host
    plan: Plan
    weights: CombineWeights
    way: Way


class TokenDispatcher:
    """Carries tokens. Make it with `build_dispatcher`.

    It has no state but its groups, the number of its plans and, for `auto`, what it knows of the sizes.
    """

    def __init__(
        self, topology: Topology, num_experts: int, label: str, choose: Chooser, tokens: int, clock: PhaseClock
    ) -> None:
        self.topology, self.num_experts, self.label, self.clock = topology, num_experts, label, clock
        self.grid = Grid(tuple(axis.size for axis in topology.axes if axis.size > 1), num_experts)
        self._choose = choose
        self._most_tokens = tokens  # of any rank, at the last call; known to all ranks alike
        self._plans = 0  # made so far

    @property
    def num_local_experts(self) -> int:
        """Experts that live on this rank."""
        return self.num_experts // self.topology.ep_size

    @property
    def first_expert(self) -> int:
        """Number of this rank's first expert; expert e lives on EP rank e // num_local_experts."""
        return self.topology.ep_rank * self.num_local_experts

    @torch.compiler.disable  # exchanges are a break in any graph
    def dispatch(self, tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> Dispatched:
        """Carry tokens to their experts. Every rank of the EP group must call this, also with N = 0.

        Args:
            tokens_ND: float [N, D]; N may differ between ranks.
            expert_ids_NK: int64 [N, K] in [0, num_experts); negative: a dropped assignment, which goes nowhere.
            weights_NK: float [N, K] combine weights; they travel with the assignments, in fp32 or fp64.

        Returns:
            Dispatched: rows [R, D] in the tokens' dtype and the number of rows of each local expert. Rows are
            differentiable in tokens_ND; the backward is a combine without weights.

        Raises:
            CommError: a rank does something else, has rows that are not finite or experts that do not exist, failed,
                died or did not come; names rank, layer and phase.
            ValueError: tokens, ids and weights do not fit each other.
        """
        with self.clock.phase(DISPATCH, self.label):
            planned = self._plan(tokens_ND, expert_ids_NK, weights_NK, chunks=1)
            weights = CombineWeights(weights_NK, planned.plan)
            (chunk,) = planned.plan.chunks
            rows_RD = last(way_there(tokens_ND, chunk, planned.way.wires))
        assert isinstance(chunk.counts, list)  # as they were asked for
        return Dispatched(rows_RD, chunk.counts, planned.plan, weights, planned.way)

    @torch.compiler.disable
    def combine(self, expert_rows_RD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """Weigh the experts' rows, add them up on the way and carry the sums home.

        Every rank of the EP group must call this, once for each `dispatch`, with the rows in the same order.

        Args:
            expert_rows_RD: float [R, D].
            dispatched: what `dispatch` returned.

        Returns:
            [N, D]: Σ_k weight · expert row for every token of this rank, 0 for a token whose assignments were all
            dropped. Sums run over the experts of a rank, the ranks of a node, the nodes, each in ascending order.
            Differentiable in expert_rows_RD and in the weights given to `dispatch`.

        Raises:
            CommError: as in `dispatch`.
            ValueError: other rows than `dispatch` returned, in number or width.
        """
        with announce_failure(self.topology, f"{self.label}, experts"):
            _check_expert_rows(expert_rows_RD, dispatched.rows)
        (chunk,) = dispatched.plan.chunks
        with self.clock.phase(COMBINE, self.label):
            return last(way_home(expert_rows_RD, dispatched.weights.of_chunks[0], chunk, dispatched.way.wires))

    @torch.compiler.disable
    def run(
        self,
        tokens_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        experts: Experts,
        beside: Callable[[], Any] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """`dispatch`, experts and `combine` in `chunks` chunks that overlap, forward and backward.

        Every rank of the EP group must call this, also with N = 0. Arguments and errors as in `dispatch`, and:

        Args:
            experts: (rows [R, D], rows of each local expert) -> [R, D]; called once for each chunk. If it has a
                `dtype`, it gets rows of that; the sums home have the tokens' in any case.
            beside: work that needs nothing of the experts (a shared expert); runs beside the first hop, before any
                call of `experts`.

        Returns:
            [N, D] as `combine` gives it, and what `beside` returned, or None.
        """
        return self.follow(self.plan(tokens_ND, expert_ids_NK, weights_NK), tokens_ND, experts, beside)

    @torch.compiler.disable
    def plan(
        self,
        tokens_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        counts_on_device: bool = False,
    ) -> Planned:
        """The first half of `run`: agree on who sends what, and bring the combine weights to the experts.

        Every rank of the EP group must call this, and `follow` afterwards. Arguments and errors as in `dispatch`, and:

        Args:
            counts_on_device: the experts also take int64 counts [E] on the device, with more rows than these say;
                what they return for those that belong to no expert goes nowhere. On a GPU that has all experts,
                neither planning nor following then waits for the device.
        """
        with self.clock.phase(DISPATCH, self.label):
            return self._plan(tokens_ND, expert_ids_NK, weights_NK, counts_on_device=counts_on_device)

    @torch.compiler.disable
    def follow(
        self, planned: Planned, tokens_ND: torch.Tensor, experts: Experts, beside: Callable[[], Any] | None = None
    ) -> tuple[torch.Tensor, Any]:
        """The second half of `run`, which may be repeated with `planned.kept()`: no counts, no assignments, no router.

        Every rank of the EP group must call this with the same plan. Returns what `run` returns, to the bit, for the
        assignments and combine weights of the plan.

        Raises:
            CommError: a rank follows another plan, does something else, failed, died or did not come; names rank,
                layer and phase. Rows of a kept plan are not looked at: what is not finite spreads.
            ValueError: tokens of another shape or dtype than those that were planned for.
        """
        with announce_failure(self.topology, f"{self.label}, dispatch"):
            if (tokens_ND.shape, tokens_ND.dtype) != planned.tokens_like:
                wanted, given = planned.tokens_like, (tokens_ND.shape, tokens_ND.dtype)
                raise ValueError(f"the plan is for tokens {[*wanted[0]]} {wanted[1]}, not {[*given[0]]} {given[1]}")
        self._most_tokens = planned.plan.most_tokens

        def announced_experts(rows_RD: torch.Tensor, counts: Any) -> torch.Tensor:
            with announce_failure(self.topology, f"{self.label}, experts"), self.clock.phase(EXPERTS, self.label):
                expert_rows_RD = experts(rows_RD, counts)
                _check_expert_rows(expert_rows_RD, rows_RD)
            return expert_rows_RD

        def phase(name: str) -> AbstractContextManager[None]:
            return self.clock.phase(name, self.label)

        dtype = getattr(experts, "dtype", tokens_ND.dtype)
        plan, wires = planned.plan, planned.way.wires
        return run(tokens_ND, planned.weights_NK, plan, wires, announced_experts, beside, phase, dtype)

    def way(self, tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor) -> Way:
        """How the next call with such tokens carries them; no communication, the same on all ranks."""
        return self._choose(self._most_tokens, expert_ids_NK.shape[1], tokens_ND.shape[1], tokens_ND.dtype)

    def _plan(
        self,
        tokens_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        chunks: int | None = None,
        counts_on_device: bool = False,
    ) -> Planned:
        with announce_failure(self.topology, f"{self.label}, dispatch"):
            check_arguments(tokens_ND, expert_ids_NK, weights_NK)
        way = self.way(tokens_ND, expert_ids_NK)
        if chunks is not None:
            way = replace(way, chunks=chunks)
        carried_NK = weights_NK.detach()
        if carried_NK.dtype != torch.float64:
            carried_NK = carried_NK.float()
        # All that decides the sizes of messages, forward and backward, and whether there is a backward.
        task = (
            f"{way.name} dispatch of [N, {tokens_ND.shape[1]}] {tokens_ND.dtype} to {expert_ids_NK.shape[1]} of "
            f"{self.num_experts} experts in {way.chunks} chunks, {carried_NK.dtype} weights, {way.wires}, "
            f"gradients of {_needing_gradient(tokens=tokens_ND, weights=weights_NK)}, {self.label}"
        )
        with torch.no_grad():
            # NaN and infinities survive a sum, so one reduction looks at every number; finite rows fit an fp64 sum.
            finite = tokens_ND.sum(dtype=torch.float64).isfinite()
            unknown_NK = expert_ids_NK >= self.num_experts
            status = torch.where(unknown_NK.any(), WRONG_EXPERTS, NOT_FINITE * ~finite)
            ids_NK = expert_ids_NK.masked_fill(unknown_NK, -1)
            on_device = counts_on_device and fused(tokens_ND)  # torch's own sums would read rows of nobody
            plan = make_plan(ids_NK, carried_NK, self.grid, way.hops, task, way.chunks, status, on_device)
        self._most_tokens = plan.most_tokens
        self._plans += 1
        return Planned(way, plan, self._plans, (tokens_ND.shape, tokens_ND.dtype), weights_NK)


def check_arguments(tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> None:
    """Raises ValueError if shapes or types are not those of `TokenDispatcher.dispatch`."""
    fits = tokens_ND.dim() == expert_ids_NK.dim() == 2 and len(tokens_ND) == len(expert_ids_NK)
    types = tokens_ND.is_floating_point() and weights_NK.is_floating_point() and expert_ids_NK.dtype == torch.int64
    if not fits or not types or weights_NK.shape != expert_ids_NK.shape:
        given = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (tokens_ND, expert_ids_NK, weights_NK))
        raise ValueError(f"dispatch takes tokens float [N, D], ids int64 [N, K], weights float [N, K], not {[*given]}")


def _check_expert_rows(expert_rows_RD: torch.Tensor, rows_RD: torch.Tensor) -> None:
    if expert_rows_RD.shape != rows_RD.shape:
        got, given = list(expert_rows_RD.shape), list(rows_RD.shape)
        raise ValueError(f"the experts made rows {got} out of {given}: the shape must stay")


def _needing_gradient(**tensors: torch.Tensor) -> list[str]:
    return [name for name, tensor in tensors.items() if torch.is_grad_enabled() and tensor.requires_grad]
