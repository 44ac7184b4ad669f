"""The experts of one rank: many small feed-forward networks over rows that are grouped by expert.

Shapes: R rows, E local experts, D model width, F hidden width, U width of the up projection.
"""

import torch
from torch import Tensor, nn

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
        """[R, U] → [R, F]."""
        return activate(h_RU, self.activation)


class ExpertPass:
    """The experts' work in one pass through a layer, whose rows may come in several calls.

    `open`, to be called once and before the first of them, says when the weights' gradients are due: after those of
    everything that is computed later (see `LateWeight`).
    """

    def __init__(self, experts: Experts, like: Tensor) -> None:
        device = like.device.type
        self.experts = experts
        self.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype

    def open(self) -> None:
        """Get the weights ready."""
        self.up, self.down = LateWeight(self.experts.up, self.dtype), LateWeight(self.experts.down, self.dtype)

    def __call__(self, rows_RD: Tensor, counts_E: Counts) -> Tensor:
        """See `Experts.forward`."""
        return self.experts.network(rows_RD.to(self.dtype), self.up, self.down, counts_E).to(rows_RD.dtype)
