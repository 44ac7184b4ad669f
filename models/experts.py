"""The experts of one rank: many small feed-forward networks over rows that are grouped by expert.

Shapes: R rows, E local experts, D model width, F hidden width, U width of the up projection.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from twohop.models.config import Activation
from twohop.models.feed_forward import activate, up_width
from twohop.models.grouped import Counts, LateWeight, grouped_linear


class Experts(nn.Module):
    """`num_experts` networks down(activate(up(x))) without biases; weights [E, out, in], as in `nn.Linear`."""

    counts_on_device = True  # see `TokenDispatcher.plan`

    def __init__(self, num_experts: int, dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Parameter(torch.empty(num_experts, up_width(ffn_dim, activation), dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, ffn_dim))

    def begin(self, like: Tensor) -> "ExpertPass":
        """A pass over rows of the kind of `like`, which may come in several parts."""
        return ExpertPass(self, like)

    def forward(self, rows_RD: Tensor, counts_E: Counts) -> Tensor:
        """Expert e maps the `counts_E[e]` rows after those of expert e - 1: [R, D] → [R, D]. R may be 0.

        Rows behind the last expert's, which come with counts on the device alone, become anything.
        Multiplies in autocast's dtype if autocast is on, and returns rows_RD's dtype, so that the sum over a token's
        experts keeps the precision of the residual stream.
        """
        whole = self.begin(rows_RD)
        whole.open()
        return whole(rows_RD, counts_E)

    def network(self, rows_RD: Tensor, up: LateWeight, down: LateWeight, counts_E: Counts) -> Tensor:
        """The arithmetic alone, in one dtype."""
        return grouped_linear(self.activate(grouped_linear(rows_RD, up, counts_E)), down, counts_E)

    def activate(self, h_RU: Tensor) -> Tensor:
        """[R, U] → [R, F]. The gradient of the result is used up: nothing but a product may take the result."""
        if torch.compiler.is_compiling():  # which fuses by itself
            return activate(h_RU, self.activation)
        activated_RF: Tensor = _Activate.apply(h_RU, self.activation)
        return activated_RF


class _Activate(torch.autograd.Function):
    """`activate`, to the bit, that keeps nothing but its input and writes over gradients that nobody needs again.

    The widest rows of a layer stand here: each copy that is not made is a fifth of the memory of a pass.
    """

    @staticmethod
    def forward(ctx: Any, h_RU: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(h_RU)
        ctx.activation = activation
        return activate(h_RU, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        (h_RU,) = ctx.saved_tensors
        if ctx.activation is not Activation.swiglu:
            return torch.ops.aten.gelu_backward.grad_input(grad_RF, h_RU, grad_input=grad_RF), None
        gate_RF, up_RF = h_RU.chunk(2, -1)
        grad_RU = torch.empty_like(h_RU)
        grad_gate_RF, grad_up_RF = grad_RU.chunk(2, -1)
        torch.ops.aten.silu.out(gate_RF, out=grad_up_RF).mul_(grad_RF)
        torch.ops.aten.silu_backward.grad_input(grad_RF.mul_(up_RF), gate_RF, grad_input=grad_gate_RF)
        return grad_RU, None


class ExpertPass:
    """The experts' work in one pass through a layer, whose rows may come in several calls.

    `open`, to be called once and before the first of them, says when the weights' gradients are due: after those of
    everything that is computed later (see `LateWeight`).
    """

    def __init__(self, experts: Experts, like: Tensor) -> None:
        device = like.device.type
        self.experts = experts
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype

    def open(self, weights: Sequence[Tensor] | None = None) -> None:
        """Get the weights ready: the experts' own, or others (up, down) of as many experts as rows will be for."""
        up_EUD, down_EDF = weights or (self.experts.up, self.experts.down)
        self.up, self.down = LateWeight(up_EUD, self.dtype), LateWeight(down_EDF, self.dtype)

    def __call__(self, rows_RD: Tensor, counts_E: Counts) -> Tensor:
        """See `Experts.forward`."""
        return self.experts.network(rows_RD.to(self.dtype), self.up, self.down, counts_E).to(rows_RD.dtype)
