"""How other systems dispatch, as short functions, each differentiable by its transpose.

All use our transport, which is kinder to those with few peers than torch's all_to_all_single over gloo.
Two layouts (one ragged row for every copy; equal blocks padded to the largest expert) times two exchanges each:

    copy per expert         ragged rows, one all-to-all              Megatron-Core, torchtitan
    gather-leader-scatter   ragged rows, one leader for each node    HetuMoE (Nie 2022), which pads them besides
    padded                  equal blocks, one all-to-all             DeepSpeed-MoE (Rajbhandari 2022), GShard
    padded, two-level       equal blocks, inside, then between       Tutel's 2DH (Hwang 2022)

Shapes: N tokens of a rank, K experts per token, n = N·K copies, C slots that are sent, P ranks, E experts, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from common import DIM, NUM_EXPERTS, Forward
from torch.autograd.function import once_differentiable

from twohop.comm import Topology, TrafficMeter
from twohop.comm.exchange import Channel

Exchange = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (rows by destination, rows_PP [source, destination])


class _Exchange(torch.autograd.Function):
    """Rows by destination -> rows by source; backward is the same exchange with both sides swapped."""

    @staticmethod
    def forward(ctx: Any, rows_CD: torch.Tensor, exchange: Exchange, rows_PP: torch.Tensor) -> torch.Tensor:
        ctx.exchange, ctx.rows_PP = exchange, rows_PP
        return exchange(rows_CD, rows_PP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.exchange(grad.contiguous(), ctx.rows_PP.T), None, None


class _Spread(torch.autograd.Function):
    """Tokens -> slots; backward sums a token's copies. Faster than index_select, whose backward adds row by row."""

    @staticmethod
    def forward(ctx: Any, x_ND: torch.Tensor, copy_C: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
        ctx.slot_NK = slot_NK
        return _take(x_ND, copy_C // slot_NK.shape[1], padded=len(copy_C) > slot_NK.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_CD[ctx.slot_NK].sum(1), None, None


class _Collect(torch.autograd.Function):
    """Slots -> the copies of every token [N, K, D]; backward puts each gradient into its slot."""

    @staticmethod
    def forward(ctx: Any, rows_CD: torch.Tensor, copy_C: torch.Tensor, slot_NK: torch.Tensor) -> torch.Tensor:
        ctx.copy_C, ctx.padded = copy_C, len(copy_C) > slot_NK.numel()
        return rows_CD[slot_NK]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NKD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _take(grad_NKD.flatten(0, 1), ctx.copy_C, ctx.padded), None, None


class _Permute(torch.autograd.Function):
    """Rows in another order."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.order = order
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.index_select(0, _inverse(ctx.order)), None


def _take(rows: torch.Tensor, index_C: torch.Tensor, padded: bool) -> torch.Tensor:
    """Rows by index; with padding, the index behind the last row is a row of zeros."""
    return (torch.cat([rows, rows.new_zeros(1, rows.shape[1])]) if padded else rows).index_select(0, index_C)


def _inverse(order: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))


def _add_up(copies_NKD: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """At home: each token's copies times their combine weights, summed [N, D]."""
    return torch.bmm(weights_NK.unsqueeze(1), copies_NKD).squeeze(1)


class Rivals:
    """Builds the rivals of one EP group of two levels. All copies are as many as assignments; nothing is dropped."""

    def __init__(self, topology: Topology, meter: TrafficMeter, scale_ED: torch.Tensor) -> None:
        """`scale_ED`: of all experts; see `common.scales`."""
        between, inside = topology.axes
        self.p, self.rank, self.grid = topology.ep_size, topology.ep_rank, (between.size, inside.size)
        self.all, self.rail, self.node = (
            Channel.make(topology, group, "rival", meter) for group in (topology.ep_group, between.group, inside.group)
        )
        self.local = NUM_EXPERTS // self.p
        self.scale_ED = scale_ED[self.rank * self.local : (self.rank + 1) * self.local]

    def forwards(self) -> dict[str, Forward]:
        return {
            "copy per expert": self._ragged(self._direct),
            "gather-leader-scatter": self._ragged(self._by_leader),
            "padded": self._padded(self._direct),
            "padded, two-level": self._padded(self._two_level),
        }

    # -- layouts ---------------------------------------------------------------------------------------------------

    def _ragged(self, exchange: Exchange) -> Forward:
        def forward(x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
            counts_PE = self._agree(ids_NK)
            rows_PP = counts_PE.view(self.p, self.p, self.local).sum(-1)
            copy_C = ids_NK.flatten().argsort(stable=True)
            slot_NK = _inverse(copy_C).view_as(ids_NK)

            rows_RD = _Exchange.apply(_Spread.apply(x_ND, copy_C, slot_NK), exchange, rows_PP)
            mine_PE = counts_PE[:, self.rank * self.local : (self.rank + 1) * self.local]
            expert_R = torch.arange(self.local).repeat(self.p).repeat_interleave(mine_PE.flatten())
            by_expert = expert_R.argsort(stable=True)
            rows_RD = _Permute.apply(rows_RD, by_expert)
            rows_RD = rows_RD * self.scale_ED.repeat_interleave(mine_PE.sum(0), dim=0)
            rows_RD = _Permute.apply(rows_RD, _inverse(by_expert))
            rows_CD = _Exchange.apply(rows_RD, exchange, rows_PP.T)
            return _add_up(_Collect.apply(rows_CD, copy_C, slot_NK), weights_NK)

        return forward

    def _padded(self, exchange: Exchange) -> Forward:
        def forward(x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
            counts_PE = self._agree(ids_NK)
            capacity = int(counts_PE.max())  # the least that drops nothing
            rows_PP = torch.full((self.p, self.p), self.local * capacity)
            by_expert = ids_NK.flatten().argsort(stable=True)
            counts_E = counts_PE[self.rank]
            first_E = counts_E.cumsum(0) - counts_E
            expert_n = ids_NK.flatten()
            slot_n = expert_n * capacity + _inverse(by_expert) - first_E[expert_n]
            copy_C = torch.full((NUM_EXPERTS * capacity,), ids_NK.numel()).scatter_(
                0, slot_n, torch.arange(len(slot_n))
            )
            slot_NK = slot_n.view_as(ids_NK)

            rows_CD = _Exchange.apply(_Spread.apply(x_ND, copy_C, slot_NK), exchange, rows_PP)
            rows_CD = (rows_CD.view(self.p, self.local, capacity, DIM) * self.scale_ED.unsqueeze(1)).view(-1, DIM)
            rows_CD = _Exchange.apply(rows_CD, exchange, rows_PP.T)
            return _add_up(_Collect.apply(rows_CD, copy_C, slot_NK), weights_NK)

        return forward

    def _agree(self, ids_NK: torch.Tensor) -> torch.Tensor:
        """[P, E]: how many copies each rank sends to each expert."""
        counts_E = ids_NK.flatten().bincount(minlength=NUM_EXPERTS)
        sizes = [NUM_EXPERTS] * self.p
        return self.all.start(counts_E.repeat(self.p), sizes, sizes, "counts").wait().view(self.p, NUM_EXPERTS)

    # -- exchanges -------------------------------------------------------------------------------------------------

    def _direct(self, rows_CD: torch.Tensor, rows_PP: torch.Tensor) -> torch.Tensor:
        send, recv = rows_PP[self.rank].tolist(), rows_PP[:, self.rank].tolist()
        return self.all.start(rows_CD, send, recv, "rows").wait()

    def _by_leader(self, rows_CD: torch.Tensor, rows_PP: torch.Tensor) -> torch.Tensor:
        """The node's ranks -> their leader, leader -> leaders, leader -> the node's ranks."""
        nodes, per_node = self.grid
        node, place = divmod(self.rank, per_node)
        rows_MLML = rows_PP.reshape(nodes, per_node, nodes, per_node)
        to_leader = [len(rows_CD)] + [0] * (per_node - 1)
        leads = place == 0
        gathered = rows_MLML[node].sum((1, 2)).tolist() if leads else [0] * per_node
        rows = self.node.start(rows_CD, to_leader, gathered, "gather").wait()
        scattered = [0] * per_node
        if leads:
            rows = _reorder_blocks(rows, rows_MLML[node], (1, 0, 2))  # by destination node
            send, recv = rows_MLML[node].sum((0, 2)).tolist(), rows_MLML[:, :, node].sum((1, 2)).tolist()
            rows = self.rail.start(rows, send, recv, "rows").wait()
            rows = _reorder_blocks(rows, rows_MLML[:, :, node], (2, 0, 1))  # by destination rank
            scattered = rows_MLML[:, :, node].sum((0, 1)).tolist()
        own = int(rows_PP[:, self.rank].sum())
        return self.node.start(rows, scattered, [own] + [0] * (per_node - 1), "scatter").wait()

    def _two_level(self, rows_CD: torch.Tensor, rows_PP: torch.Tensor) -> torch.Tensor:
        """Equal blocks to the local rank of their destination inside the node, then along the rail."""
        nodes, per_node = self.grid
        block = int(rows_PP[0, 0])
        blocks = rows_CD.view(nodes, per_node, block * DIM).transpose(0, 1).reshape(-1, block * DIM)
        blocks = self.node.start(blocks, [nodes] * per_node, [nodes] * per_node, "rows").wait()
        blocks = blocks.view(per_node, nodes, block * DIM).transpose(0, 1).reshape(-1, block * DIM)
        return self.rail.start(blocks, [per_node] * nodes, [per_node] * nodes, "rows").wait().view(-1, DIM)


def _reorder_blocks(rows: torch.Tensor, sizes: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Blocks of rows that stand as `sizes` [a, b, c], in the order of the permuted dimensions."""
    blocks = rows.split(sizes.flatten().tolist())
    order = torch.arange(sizes.numel()).view(sizes.shape).permute(dims).flatten().tolist()
    return torch.cat([blocks[i] for i in order])
