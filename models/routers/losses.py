"""What a router adds to the training loss: a new loss is one function here, one line in `LOSSES`, and its weight
`<name>_loss` in `RouterConfig`.

Shapes: B sequences, T positions, N = B·T tokens of the micro-batch, E experts of the layer, K experts for each token.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from twohop.models.config import RouterConfig

if TYPE_CHECKING:
    from twohop.models.routers.base import TokenInfo


class Scores(NamedTuple):
    """How a router judged the tokens of a micro-batch, and what it chose."""

    logits_NE: Tensor  # without noise
    probs_NE: Tensor  # in [0, 1]; they sum to 1 over the experts
    ids_NK: Tensor  # int64, the chosen experts
    load_E: Tensor  # int64, assignments of each expert, over what `load_balance_over` says
    about: "TokenInfo"
    noisy_NE: Tensor | None = None  # the logits by which experts were chosen, of a router that adds noise
    noise_std: float = 0.0  # of noisy_NE around logits_NE


def load_balance_loss(probs_NE: Tensor, load_E: Tensor) -> Tensor:
    """E · Σ_e f_e · P_e with f over all K choices and P the mean probability: 1 when balanced (Fedus 2021).

    The gradient reaches the router through P alone; f is a count. It may be counted over more tokens than P's mean:
    over the global batch (Qiu 2025, Qwen3), experts may specialise inside a micro-batch.
    """
    num_tokens, num_experts = probs_NE.shape
    fraction_E = load_E.to(probs_NE.dtype) / load_E.sum().clamp(min=1)
    mean_prob_E = probs_NE.sum(0) / max(1, num_tokens)
    return num_experts * (fraction_E * mean_prob_E).sum()


def sequence_loss(probs_NE: Tensor, ids_NK: Tensor, about: "TokenInfo") -> Tensor:
    """`load_balance_loss` of each sequence by itself, averaged over the sequences (DeepSeek-AI 2024, DeepSeek-V3).

    f counts the experts that were chosen, bias and groups included.
    """
    num_tokens, num_experts = probs_NE.shape
    if num_tokens == 0:
        return probs_NE.sum()
    chosen_NE = torch.zeros_like(probs_NE).scatter_(1, ids_NK, 1.0)
    fraction_BE = about.mean(chosen_NE) / ids_NK.shape[1]
    return num_experts * (fraction_BE * about.mean(probs_NE)).sum(-1).mean()


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)²: keeps logits small (Zoph 2022, ST-MoE)."""
    return logits_NE.logsumexp(-1).square().sum() / max(1, logits_NE.shape[0])


def importance_loss(logits_NE: Tensor) -> Tensor:
    """(std / mean)² over experts of Σ softmax(logits), without noise (Riquelme 2021, V-MoE)."""
    return _squared_variation(logits_NE.softmax(-1).sum(0))


def load_loss(logits_NE: Tensor, noisy_NE: Tensor, noise_std: float, top_k: int) -> Tensor:
    """(std / mean)² over experts of the mean chance to be chosen, were the noise drawn again (Riquelme 2021, V-MoE).

    A token's chance for expert i is 1 - Φ((K-th largest noisy logit - logit_i) / noise_std).
    """
    threshold_N1 = noisy_NE.topk(top_k, -1).values[:, -1:]
    chance_NE = torch.special.ndtr((logits_NE - threshold_N1) / noise_std)
    return _squared_variation(chance_NE.sum(0))


def _squared_variation(x_E: Tensor) -> Tensor:
    """Population variance over squared mean; 0 for zeros, which is what no tokens leave."""
    tiny = torch.finfo(x_E.dtype).tiny
    return x_E.var(correction=0) / x_E.mean().square().clamp(min=tiny)


def _load(scores: Scores) -> Tensor:
    if scores.noisy_NE is None:  # without noise a chance is 0 or 1, and has no gradient
        return scores.logits_NE.new_zeros(())
    return load_loss(scores.logits_NE, scores.noisy_NE, scores.noise_std, scores.ids_NK.shape[1])


LOSSES: dict[str, Callable[[Scores], Tensor]] = {
    "load_balance": lambda scores: load_balance_loss(scores.probs_NE, scores.load_E),
    "sequence": lambda scores: sequence_loss(scores.probs_NE, scores.ids_NK, scores.about),
    "z": lambda scores: z_loss(scores.logits_NE),
    "importance": lambda scores: importance_loss(scores.logits_NE),
    "load": _load,
}


def weighted_losses(config: RouterConfig, options: Collection[str], scores: Scores) -> dict[str, Tensor]:
    """The losses among a router's `options` whose weight is positive, by name, each multiplied by its weight."""
    weights = {name: getattr(config, f"{name}_loss") for name in LOSSES if f"{name}_loss" in options}
    return {name: weight * LOSSES[name](scores) for name, weight in weights.items() if weight > 0}
