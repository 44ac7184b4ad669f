"""Token dispatchers: carry tokens to the ranks of their experts, and the experts' results home.

`flat`, `hierarchical` and `dedup` differ in their route alone (see `twohop.comm.routes`); with the fp32 wire,
outputs and all gradients are the same to the bit.
Shapes: N tokens, D width, K experts per token, R rows at this rank's experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from twohop.comm.counts import Grid
from twohop.comm.exchange import Channel
from twohop.comm.pipeline import Experts, carry_weights, last, run, way_home, way_there
from twohop.comm.plan import Plan, make_plan
from twohop.comm.routes import ROUTES, Hop
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter
from twohop.comm.wire import Wires


@dataclass(frozen=True)
class Dispatched:
    """Tokens at their experts."""

    rows: torch.Tensor  # [R, D], grouped by local expert; inside one by home rank, then token
    counts: list[int]  # rows of each local expert, on the host
    plan: Plan
    weight_n: torch.Tensor  # combine weights, in order of arrival


class TokenDispatcher:
    """Carries tokens along one route. Make it with `build_dispatcher`; it has no state but its groups."""

    def __init__(
        self,
        name: str,
        topology: Topology,
        num_experts: int,
        chunks: int,
        wires: Wires,
        label: str,
        meter: TrafficMeter | None,
    ) -> None:
        self.name, self.topology, self.num_experts = name, topology, num_experts
        self.chunks, self.wires, self.label = chunks, wires, label
        axes = [axis for axis in topology.axes if axis.size > 1]  # a level of one rank has nothing to exchange
        self.grid = Grid(tuple(axis.size for axis in axes), num_experts)
        self._hops: list[tuple[Hop, Channel]] = []
        for hop in ROUTES[name](len(axes)) if axes else []:
            group = axes[hop.exchange[0]].group if len(hop.exchange) == 1 else topology.ep_group
            self._hops.append((hop, Channel.make(topology, group, label, meter)))

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
            CommError: another rank does something else, has rows that are not finite, died or did not come;
                names rank, layer and phase.
        """
        plan = self._plan(tokens_ND, expert_ids_NK, weights_NK, chunks=1)
        (weight_n,) = carry_weights(weights_NK, plan)
        (chunk,) = plan.chunks
        return Dispatched(last(way_there(tokens_ND, chunk, self.wires)), chunk.counts, plan, weight_n)

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
        (chunk,) = dispatched.plan.chunks
        return last(way_home(expert_rows_RD, dispatched.weight_n, chunk, self.wires))

    def run(
        self,
        tokens_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        experts: Experts,
        beside: Callable[[], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`dispatch`, experts and `combine` in `chunks` chunks that overlap, forward and backward.

        Every rank of the EP group must call this, also with N = 0. Arguments and errors as in `dispatch`, and:

        Args:
            experts: (rows [R, D], rows of each local expert) -> [R, D]; called once for each chunk.
            beside: work that needs nothing of the experts (a shared expert); runs beside the first hop.

        Returns:
            [N, D] as `combine` gives it, and what `beside` returned, or None.
        """
        plan = self._plan(tokens_ND, expert_ids_NK, weights_NK, self.chunks)
        return run(tokens_ND, weights_NK, plan, self.wires, experts, beside)

    @torch.no_grad()
    def _plan(
        self, tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor, chunks: int
    ) -> Plan:
        carried_NK = weights_NK.detach()
        if carried_NK.dtype != torch.float64:
            carried_NK = carried_NK.float()
        k, d, dtype = expert_ids_NK.shape[1], tokens_ND.shape[1], tokens_ND.dtype
        task = (
            f"{self.name} dispatch of [N, {d}] {dtype} to {k} of {self.num_experts} experts "
            f"in {chunks} chunks, {self.label}"
        )
        # NaN and infinities survive a sum, so one reduction looks at every number.
        status = (~tokens_ND.detach().sum(dtype=carried_NK.dtype).isfinite()).long()
        return make_plan(expert_ids_NK, carried_NK, self.grid, self._hops, task, chunks, status)


def build_dispatcher(
    name: str,
    topology: Topology,
    num_experts: int,
    *,
    chunks: int = 1,
    wires: Wires | None = None,
    label: str = "",
    meter: TrafficMeter | None = None,
) -> TokenDispatcher:
    """Make the dispatcher `name`: flat, hierarchical or dedup. Makes no communication.

    Args:
        topology: its EP group shares the experts.
        num_experts: in the whole layer; a multiple of topology.ep_size.
        chunks: into how many `run` cuts the tokens to overlap their hops; must be the same on all ranks.
        wires: how rows are encoded on each hop; None sends them as they are.
        label: names the layer in errors.
        meter: counts what is sent.

    Raises:
        ValueError: an unknown name, or experts that the EP group cannot share evenly.
    """
    if name not in ROUTES:
        raise ValueError(f"unknown dispatcher {name!r}: use one of {', '.join(ROUTES)}")
    if num_experts % topology.ep_size:
        raise ValueError(
            f"{num_experts} experts cannot be shared by {topology.ep_size} expert-parallel ranks: "
            f"use an EP size that divides {num_experts}"
        )
    if chunks < 1:
        raise ValueError(f"chunks={chunks}: use 1 for no overlap, or more")
    return TokenDispatcher(name, topology, num_experts, chunks, wires or Wires(), label, meter)
