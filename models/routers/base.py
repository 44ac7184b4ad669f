"""What every router gets and returns, and the parts that routers share.

Shapes: B sequences, T positions, N = B·T tokens of the micro-batch, D model width,
E experts of the layer, K experts for each token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """A router's decision for one micro-batch, before any capacity.

    A named tuple, so that PyTorch's utilities (FSDP, checkpointing, compile) see the tensors inside.
    """

    ids_NK: Tensor  # int64, chosen experts in order of preference; -1: no expert in this place
    weights_NK: Tensor  # fp32 (fp64 if the tokens are), factors of the experts' outputs
    losses: dict[str, Tensor]  # scalars, each already multiplied by its weight
    load_E: Tensor  # int64, how many of this micro-batch's assignments chose each expert


class TokenInfo(NamedTuple):
    """What a router may know of a micro-batch beside the tokens' states; None where the model has no such thing."""

    num_sequences: int  # B; the N tokens stand sequence by sequence
    token_BT: Tensor | None = None  # int64 ids in the vocabulary
    task_B: Tensor | None = None  # int64, the task of each sequence
    sample_B: Tensor | None = None  # int64, the number of each sequence in the data set


class Router(nn.Module):
    """From tokens to `Routing`. A subclass is one file, and one line in `ROUTERS`."""

    causal = True  # a token's route depends on no later token of its sequence and on no other sequence

    def forward(self, x_ND: Tensor, about: TokenInfo) -> Routing:
        """Route the tokens [N, D] of a micro-batch."""
        raise NotImplementedError

    def after_step(self, load_E: Tensor) -> None:
        """Learn, after an optimizer step, how many assignments of the global batch chose each expert: fp64 [E]."""


class Gate(nn.Module):
    """The linear map from a token to its router logits, always in fp32 (fp64 for fp64 tokens).

    `jitter` multiplies each input by U(1 - jitter, 1 + jitter) while training (Fedus 2021, Switch Transformer).
    """

    def __init__(self, dim: int, num_experts: int, jitter: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.jitter = jitter

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] → [N, E]."""
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        if self.training and self.jitter > 0:
            x_ND = x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)
        # A bf16 logit has 8 bits: near ties would flip the choice of an expert, so autocast stays out of here.
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND, self.weight.to(x_ND.dtype))


def count_assignments(ids_NK: Tensor, num_experts: int) -> Tensor:
    """Number of assignments of every expert, int64 [E]; places with id -1 are not counted. No host sync."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_NK.device)
    flat = ids_NK.flatten() + 1
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[1:]


def load_balance_loss(probs_NE: Tensor, load_E: Tensor, top_k: int) -> Tensor:
    """E · Σ_e f_e · P_e with f over all K choices and P the mean probability: 1 when balanced (Fedus 2021).

    The gradient reaches the router through P alone; f is a count.
    """
    num_tokens, num_experts = probs_NE.shape
    fraction_E = load_E.to(probs_NE.dtype) / max(1, num_tokens * top_k)
    mean_prob_E = probs_NE.sum(0) / max(1, num_tokens)
    return num_experts * (fraction_E * mean_prob_E).sum()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)²: keeps logits small (Zoph 2022, ST-MoE)."""
    return logits_NE.logsumexp(-1).square().sum() / max(1, logits_NE.shape[0])
