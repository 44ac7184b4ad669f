"""The dense feed-forward network, which is also the shared expert and PR-MoE's residual branch.

Shapes: D model width, F hidden width; U width of the up projection, F for GELU and 2F for SwiGLU (gate, then up).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.config import Activation


def up_width(ffn_dim: int, activation: Activation) -> int:
    """Output width of the up projection. SwiGLU's gate and up matrices are one, so that they are one matmul."""
    return 2 * ffn_dim if activation is Activation.swiglu else ffn_dim


def activate(h: Tensor, activation: Activation) -> Tensor:
    """[…, U] → […, F]: GELU(h), or SiLU(gate) · up (Shazeer 2020)."""
    if activation is Activation.swiglu:
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(h)


class FeedForward(nn.Module):
    """down(activate(up(x))), without biases."""

    def __init__(self, dim: int, ffn_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up = nn.Linear(dim, up_width(ffn_dim, activation), bias=False)
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, D] → […, D]."""
        return self.down(activate(self.up(x), self.activation))
