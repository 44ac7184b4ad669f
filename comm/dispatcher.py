"""Token dispatchers: carry tokens to the ranks of their experts, and the experts' results home.

`flat`, `hierarchical` and `dedup` differ in their route alone (see `twohop.comm.plan`); outputs and all gradients
are the same to the bit. Shapes: N tokens, D width, K experts per token, R rows at this rank's experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from twohop.comm.exchange import Channel
from twohop.comm.plan import Grid, Hop, Plan, make_plan
from twohop.comm.topology import Axis, Topology
from twohop.comm.traffic import TrafficMeter

# A route lists (levels to spread on, axes to exchange along) of each hop, for a grid of so many levels.
Route = Callable[[int], list[tuple[tuple[int, ...], tuple[int, ...]]]]


def flat(levels: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """One exchange among all ranks; a token is sent once to every rank that holds one of its experts."""
    everything = tuple(range(levels))
    return [(everything, everything)]


def hierarchical(levels: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inside the node first, then outwards: few large messages, the same bytes (DeepSpeed-MoE and Tutel, 2022)."""
    everything = tuple(range(levels))
    return [(everything if axis == levels - 1 else (), (axis,)) for axis in reversed(everything)]


def dedup(levels: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Between nodes first, once for every node that holds one of a token's experts, then inside (DeepEP, 2025)."""
    return [((axis,), (axis,)) for axis in range(levels)]


ROUTES: dict[str, Route] = {"flat": flat, "hierarchical": hierarchical, "dedup": dedup}


@dataclass(frozen=True)
class Dispatched:
    """Tokens at their experts."""

    rows: torch.Tensor  # [R, D], grouped by local expert; inside one by home rank, then token
    counts: list[int]  # rows of each local expert, on the host
    plan: Plan
    weights_NK: torch.Tensor


class TokenDispatcher:
    """Carries tokens along one route. Make it with `build_dispatcher`; it has no state but its groups."""

    def __init__(
        self, name: str, topology: Topology, num_experts: int, label: str = "", meter: TrafficMeter | None = None
    ) -> None:
        if num_experts % topology.ep_size:
            raise ValueError(
                f"{num_experts} experts cannot be shared by {topology.ep_size} expert-parallel ranks: "
                f"use an EP size that divides {num_experts}"
            )
        self.name, self.topology, self.num_experts, self.label = name, topology, num_experts, label
        axes = [axis for axis in topology.axes if axis.size > 1]  # a level of one rank has nothing to exchange
        self.grid = Grid(tuple(axis.size for axis in axes), num_experts)
        self.hops = [
            Hop(spread, exchange, Channel.make(topology, self._group(axes, exchange), label, meter))
            for spread, exchange in (ROUTES[name](len(axes)) if axes else [])
        ]

    def _group(self, axes: list[Axis], exchange: tuple[int, ...]) -> Any:
        return axes[exchange[0]].group if len(exchange) == 1 else self.topology.ep_group

    @property
    def num_local_experts(self) -> int:
        """Experts that live on this rank."""
        return self.num_experts // self.topology.ep_size

    @property
    def first_expert(self) -> int:
        """Number of this rank's first expert; expert e lives on EP rank e // num_local_experts."""
        return self.topology.ep_rank * self.num_local_experts

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
            CommError: another rank does something else, died or did not come; names rank, layer and phase.
        """
        with torch.no_grad():
            carried_NK = weights_NK.detach()
            if carried_NK.dtype != torch.float64:
                carried_NK = carried_NK.float()
            k, d, dtype = expert_ids_NK.shape[1], tokens_ND.shape[1], tokens_ND.dtype
            task = f"{self.name} dispatch of [N, {d}] {dtype} to {k} of {self.num_experts} experts, {self.label}"
            plan = make_plan(expert_ids_NK, carried_NK, self.grid, self.hops, task)
        rows_RD = _Dispatch.apply(tokens_ND, plan)
        return Dispatched(rows_RD, plan.counts, plan, weights_NK)

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
        """
        return _Combine.apply(expert_rows_RD, dispatched.weights_NK, dispatched.plan)


def build_dispatcher(
    name: str, topology: Topology, num_experts: int, *, label: str = "", meter: TrafficMeter | None = None
) -> TokenDispatcher:
    """Make the dispatcher `name`: flat, hierarchical or dedup. Makes no communication.

    Args:
        topology: its EP group shares the experts.
        num_experts: in the whole layer; a multiple of topology.ep_size.
        label: names the layer in errors.
        meter: counts what is sent.

    Raises:
        ValueError: an unknown name, or experts that the EP group cannot share evenly.
    """
    if name not in ROUTES:
        raise ValueError(f"unknown dispatcher {name!r}: use one of {', '.join(ROUTES)}")
    return TokenDispatcher(name, topology, num_experts, label, meter)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_ND: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        return plan.down(tokens_ND, "dispatch")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.plan.up(grad_RD, "dispatch backward"), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, expert_rows_RD: torch.Tensor, weights_NK: torch.Tensor, plan: Plan) -> torch.Tensor:
        ctx.plan = plan
        ctx.save_for_backward(expert_rows_RD)
        ctx.weights_like = (weights_NK.shape, weights_NK.dtype)
        return plan.up(expert_rows_RD, "combine", plan.weight_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        plan: Plan = ctx.plan
        (expert_rows_RD,) = ctx.saved_tensors
        grad_RD = plan.down(grad_ND, "combine backward")
        grad_weights_NK = None
        if ctx.needs_input_grad[1]:
            weight_dtype = plan.weight_n.dtype
            grad_R = (grad_RD.to(weight_dtype) * expert_rows_RD).sum(-1)
            shape, dtype = ctx.weights_like
            grad_weights_NK = plan.assignments_up(grad_R, "metadata backward").view(shape).to(dtype)
        weight_R1 = torch.empty_like(plan.weight_n).index_copy_(0, plan.order_R, plan.weight_n).unsqueeze(1)
        return (grad_RD * weight_R1).to(expert_rows_RD.dtype), grad_weights_NK, None
