"""Slow and plain versions of what the models do, written apart from them, for tests to compare with."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from twohop.models.config import Activation, MoEConfig, Residual
from twohop.models.moe import MoELayer


class ReferenceDispatcher:
    """Token dispatch in one process, as the interface says it: rows grouped by expert, then by token, no padding."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = self.num_local_experts = num_experts
        self.first_expert = 0

    def dispatch(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> SimpleNamespace:
        chosen = [(ids_NK == e).nonzero() for e in range(self.num_experts)]
        token_R, choice_R = torch.cat(chosen).unbind(1)
        return SimpleNamespace(
            rows=x_ND[token_R],
            counts=[len(pairs) for pairs in chosen],
            token_R=token_R,
            weights_R=weights_NK[token_R, choice_R],
            num_tokens=len(x_ND),
        )

    def combine(self, rows_RD: Tensor, dispatched: SimpleNamespace) -> Tensor:
        weighted_RD = rows_RD * dispatched.weights_R[:, None].to(rows_RD.dtype)
        y_ND = rows_RD.new_zeros(dispatched.num_tokens, rows_RD.shape[1])
        return y_ND.index_add(0, dispatched.token_R, weighted_RD)

    def plan(
        self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, counts_on_device: bool = False
    ) -> tuple[Tensor, Tensor]:
        return ids_NK, weights_NK

    def follow(
        self, planned: tuple[Tensor, Tensor], x_ND: Tensor, experts: Any, beside: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        dispatched, beside_output = self.dispatch(x_ND, *planned), beside()
        return self.combine(experts(dispatched.rows, dispatched.counts), dispatched), beside_output


def capacity_keeps(ids_NK: Tensor, capacity: int) -> Tensor:
    """Which assignments stay, filling queues one by one: first choices of all tokens, then second ones, …"""
    keep_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    used: dict[int, int] = {}
    for k in range(ids_NK.shape[1]):
        for n in range(ids_NK.shape[0]):
            expert = int(ids_NK[n, k])
            if expert >= 0 and used.get(expert, 0) < capacity:
                keep_NK[n, k] = True
                used[expert] = used.get(expert, 0) + 1
    return keep_NK


def feed_forward(x: Tensor, up: Tensor, down: Tensor, activation: Activation) -> Tensor:
    h = x @ up.T
    if activation is Activation.swiglu:
        gate, linear = h[: len(h) // 2], h[len(h) // 2 :]
        return down @ (gate * torch.sigmoid(gate) * linear)
    return down @ (0.5 * h * (1 + torch.erf(h / 2**0.5)))


def moe_layer(layer: MoELayer, config: MoEConfig, x_BTD: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    """Output and weighted auxiliary loss of a softmax top-k layer, token by token."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    logits_NE = x_ND @ layer.router.gate.weight.T
    exp_NE = (logits_NE - logits_NE.max(1, keepdim=True).values).exp()
    probs_NE = exp_NE / exp_NE.sum(1, keepdim=True)
    ids_NK = probs_NE.argsort(1, descending=True)[:, : config.router.top_k]
    keep_NK = torch.ones_like(ids_NK, dtype=torch.bool) if capacity is None else capacity_keeps(ids_NK, capacity)
    activation = layer.experts.activation

    outputs = []
    for n, x in enumerate(x_ND):
        chosen_probs = probs_NE[n, ids_NK[n]]
        if config.router.renormalize:
            chosen_probs = chosen_probs / chosen_probs.sum()
        y = torch.zeros_like(x)
        for k, expert in enumerate(ids_NK[n].tolist()):
            if keep_NK[n, k]:
                y = y + chosen_probs[k] * feed_forward(
                    x, layer.experts.up[expert], layer.experts.down[expert], activation
                )
        if config.shared_ffn_dim:
            y = y + feed_forward(x, layer.shared.up.weight, layer.shared.down.weight, activation)
        if config.residual is not Residual.none:
            dense = feed_forward(x, layer.residual.mlp.up.weight, layer.residual.mlp.down.weight, activation)
            if config.residual is Residual.learned:
                mix = (layer.residual.mix.weight @ x + layer.residual.mix.bias).exp()
                y, dense = y * mix[0] / mix.sum(), dense * mix[1] / mix.sum()
            y = y + dense
        outputs.append(y)

    num_experts = probs_NE.shape[1]
    balance = sum((ids_NK == e).to(x).mean() * probs_NE[:, e].mean() for e in range(num_experts)) * num_experts
    z = (exp_NE.sum(1).log() + logits_NE.max(1).values).square().mean()
    return torch.stack(outputs).view_as(x_BTD), config.router.load_balance_loss * balance + config.router.z_loss * z
