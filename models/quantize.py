"""Experts with weights of 8 or 4 bits, for evaluation and generation (torchao's weight-only quantisation).

torchao takes matrices of linear layers, so each expert's two matrices are quantised one by one: symmetric integers,
with an fp32 scale for each row (8 bits) or for each 32 weights of a row (4 bits, two in a byte). A matrix is multiplied
by torchao in the precision of the tokens; the activations are not quantised.

Shapes: R rows, E local experts, D model width, F hidden width, U width of the up projection, I and O of any projection,
P bytes of a row's weights, G scales of a row.
"""

import logging
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.config import Activation
from twohop.models.experts import Experts
from twohop.models.feed_forward import activate, up_width

if TYPE_CHECKING:
    from twohop.models.base import MoEModel

GROUP = 32  # weights of 4 bits that share a scale


def quantize_experts(model: "MoEModel", bits: int) -> None:
    """Replace the experts of every MoE layer, each rank its own, by experts of 8 or 4 bits. No communication.

    Raises ValueError if 4 bits do not fit the widths of a layer, or if the experts have few bits already.
    """
    for _, layer in model.moe_layers():
        if isinstance(layer.experts, QuantizedExperts):
            raise ValueError(f"the experts have {layer.experts.bits} bits already: quantise those they came from")
        layer.experts = QuantizedExperts.of(layer.experts, bits)


class QuantizedExperts(nn.Module):
    """`Experts` without gradients, whose weights are integers and scales; both have the expert as first dimension."""

    counts_on_device = False  # see `TokenDispatcher.plan`

    def __init__(self, num_experts: int, dim: int, ffn_dim: int, activation: Activation, bits: int) -> None:
        super().__init__()
        if bits == 4 and (dim % GROUP or ffn_dim % GROUP):
            raise ValueError(
                f"weights of 4 bits share a scale among {GROUP}, but the experts are {dim} and {ffn_dim} wide: "
                f"use 8 bits, or widths that {GROUP} divides"
            )
        self.activation, self.bits = activation, bits
        for name, out_width, in_width in (("up", up_width(ffn_dim, activation), dim), ("down", dim, ffn_dim)):
            stored = torch.empty(num_experts, out_width, in_width * bits // 8, dtype=torch.int8)
            scales = torch.empty(num_experts, out_width, in_width // GROUP if bits == 4 else 1)
            self.register_parameter(name, nn.Parameter(stored, requires_grad=False))
            self.register_parameter(f"{name}_scale", nn.Parameter(scales, requires_grad=False))

    @classmethod
    def of(cls, experts: Experts, bits: int) -> "QuantizedExperts":
        """The same experts in fewer bits."""
        num_experts, dim, ffn_dim = experts.down.shape
        made = cls(num_experts, dim, ffn_dim, experts.activation, bits).to(experts.down.device)
        for name in ("up", "down"):
            pairs = [_quantize(matrix_OI, bits) for matrix_OI in getattr(experts, name).detach()]
            getattr(made, name).copy_(torch.stack([stored_OP for stored_OP, _ in pairs]))
            getattr(made, f"{name}_scale").copy_(torch.stack([scale_OG for _, scale_OG in pairs]))
        return made

    def begin(self, like: Tensor) -> "QuantizedExperts":
        """The experts themselves: without gradients, nothing has to be got ready for a pass."""
        return self

    def open(self) -> None:
        """See `ExpertPass`."""

    def forward(self, rows_RD: Tensor, counts_E: Sequence[int]) -> Tensor:
        """See `Experts.forward`; experts without rows are not touched."""
        outputs = []
        for expert, rows in enumerate(rows_RD.split(list(counts_E))):
            if len(rows):
                h_RU = F.linear(rows, self._matrix("up", expert, rows.dtype))
                outputs.append(F.linear(activate(h_RU, self.activation), self._matrix("down", expert, rows.dtype)))
        return torch.cat(outputs) if outputs else rows_RD

    def _matrix(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """One matrix as a tensor of torchao's, which `F.linear` knows to multiply with."""
        ao = _torchao()
        stored_OP, scale_OG = getattr(self, name)[expert], getattr(self, f"{name}_scale")[expert].to(dtype)
        integers_OI = stored_OP if self.bits == 8 else _unpack(stored_OP)
        group = integers_OI.shape[1] // scale_OG.shape[1]
        zeros_OG = torch.zeros_like(scale_OG, dtype=torch.int8)
        kind = getattr(torch, f"int{self.bits}")
        matrix: Tensor = ao.IntxUnpackedToInt8Tensor(integers_OI, scale_OG, zeros_OG, kind, (1, group), dtype, None)
        return matrix


def _quantize(matrix_OI: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A matrix as int8 [O, P] and its scales [O, G]."""
    ao = _torchao()
    out_width, in_width = matrix_OI.shape
    linear = nn.Linear(in_width, out_width, bias=False, device="meta")
    linear.weight = nn.Parameter(matrix_OI.float(), requires_grad=False)
    granularity = ao.PerAxis(0) if bits == 8 else ao.PerGroup(GROUP)
    ao.quantize_(linear, ao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity))
    weight: Any = linear.weight
    return weight.qdata if bits == 8 else _pack(weight.qdata), weight.scale


def _pack(integers_OI: Tensor) -> Tensor:
    """Integers in [-8, 7], two in a byte: the even columns in the low halves."""
    low_OP, high_OP = integers_OI[:, ::2], integers_OI[:, 1::2]
    return (low_OP & 15) | (high_OP << 4)


def _unpack(stored_OP: Tensor) -> Tensor:
    # A shift of a signed integer to the right copies the sign.
    return torch.stack([(stored_OP << 4) >> 4, stored_OP >> 4], -1).flatten(1)


def _torchao() -> Any:
    """`torchao.quantization`, imported where it is used: it takes a second, and tells of kernels that are not built."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return import_module("torchao.quantization")
