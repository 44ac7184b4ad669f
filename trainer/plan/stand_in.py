"""A dispatcher for models without memory: carries no rows, but makes and keeps as much as a real one.

Shapes: N tokens, K experts of a token, D model width, S rows sent, R rows at the experts, E local experts, I and O
widths.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from twohop.comm import TokenDispatcher, Topology
from twohop.models import ModelConfig, grouped

FIRST_NUMBER = 1009  # of the experts of the first layer; no other size of a model without memory is likely to be that


class StandInPlan(NamedTuple):
    """How many rows go and come, and what their weights are."""

    sent: int
    rows: int
    weights_NK: Tensor

    def kept(self) -> "StandInPlan":
        """See `twohop.comm.Planned`."""
        return self._replace(weights_NK=self.weights_NK.detach())


class StandIn(TokenDispatcher):
    """Sends S = N·K rows, or fewer where a capacity drops some, and gives the experts R = S times the rank's load.

    Its rank has `FIRST_NUMBER` experts and one more for each layer before it: so a tensor tells of which layer it is.
    It counts how often rows travelled to experts and home.
    """

    def __init__(self, layer: int, num_experts: int, load: float, capacity_factor: float | None) -> None:
        self.topology, self.num_experts = Topology.one_process(), num_experts
        self.load, self.not_dropped = load, min(1.0, capacity_factor or 1.0)
        self.layer, self.dispatched, self.combined = layer, 0, 0

    @property
    def num_local_experts(self) -> int:
        """See above."""
        return FIRST_NUMBER + self.layer

    def plan(self, tokens_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, counts_on_device: bool = False) -> Any:
        """How many rows go and come."""
        sent = int(expert_ids_NK.numel() * self.not_dropped)
        return StandInPlan(sent, int(sent * self.load), weights_NK)

    def follow(
        self, planned: Any, tokens_ND: Tensor, experts: Callable, beside: Callable[[], Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Makes and keeps what `twohop.comm.pipeline` makes and keeps on a way of one hop."""
        output = None
        arrived_RD = _Exchange.apply(_Copy.apply(tokens_ND, planned.sent, tokens_ND.dtype), planned.rows)
        if beside is not None:
            output = beside()
        self.dispatched += 1
        counts = [planned.rows] + [0] * (self.num_local_experts - 1)
        rows_RD = _Copy.apply(arrived_RD, planned.rows, getattr(experts, "dtype", tokens_ND.dtype))
        del arrived_RD
        expert_rows_RD = experts(rows_RD, counts)
        # As there, nothing but the exchange holds what it sends.
        home_SD = _Exchange.apply(_Weigh.apply(expert_rows_RD, planned.weights_NK, tokens_ND.dtype), planned.sent)
        home_ND = _Sum.apply(home_SD, len(tokens_ND))
        self.combined += 1
        return home_ND, output


class _Copy(torch.autograd.Function):
    """[N, D] -> [rows, D]; backward sums."""

    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        ctx.tokens, ctx.dtype = len(tokens_ND), tokens_ND.dtype
        return tokens_ND.new_empty(rows, tokens_ND.shape[1], dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return grad_RD.new_empty(ctx.tokens, grad_RD.shape[1], dtype=ctx.dtype), None, None


class _Exchange(torch.autograd.Function):
    """Rows that have been received, [S, D] -> [R, D]; backward the other way."""

    @staticmethod
    def forward(ctx: Any, sent_SD: Tensor, rows: int) -> Tensor:
        ctx.sent = len(sent_SD)
        return sent_SD.new_empty(rows, sent_SD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return grad_RD.new_empty(ctx.sent, grad_RD.shape[1]), None


class _Weigh(torch.autograd.Function):
    """The experts' rows times their weights, [R, D] as they travel home; keeps both."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_NK: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_NK.new_empty(len(rows_RD)))
        ctx.weights = weights_NK.shape
        return rows_RD.new_empty(rows_RD.shape, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_RD, weight_n = ctx.saved_tensors
        return torch.empty_like(rows_RD), weight_n.new_empty(ctx.weights), None


class _Sum(torch.autograd.Function):
    """[R, D] -> [tokens, D]; backward copies."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, tokens: int) -> Tensor:
        ctx.rows = len(rows_RD)
        return rows_RD.new_empty(tokens, rows_RD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return grad_ND.new_empty(ctx.rows, grad_ND.shape[1]), None


def stand_ins(config: ModelConfig, loads: Sequence[float]) -> list[StandIn]:
    """One for each MoE layer, an encoder's first; for `loads` see `twohop.trainer.plan.passes`."""
    stacks = [config] if config.encoder is None else [config.encoder_stack, config]
    layers = [(experts, stack.moe.capacity_factor) for stack in stacks for experts in stack.experts_by_block if experts]
    return [
        StandIn(number, experts, load, factor)
        for number, ((experts, factor), load) in enumerate(zip(layers, loads, strict=True))
    ]


@contextmanager
def grouped_products() -> Iterator[None]:
    """Experts' products as one matrix product over all rows: `grouped_mm` is not defined for such tensors."""

    def multiply(x_RI: Tensor, w_EIO: Tensor, counts_E: Sequence[int]) -> Tensor:
        return x_RI @ w_EIO[0]

    def weight_gradient(uses: list[tuple[Tensor, Tensor, Sequence[int]]]) -> Tensor:
        x_RI, grad_RO, counts_E = uses[0]
        return (grad_RO.T @ x_RI).new_empty(len(counts_E), grad_RO.shape[1], x_RI.shape[1])

    with patch.object(grouped, "_multiply", multiply), patch.object(grouped, "_weight_gradient", weight_gradient):
        yield
