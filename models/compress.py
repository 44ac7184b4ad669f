"""Fewer experts out of many: those that are used least are left out, or merged into the one most like them.

An expert's score is its use × its mean gate weight, that is the sum of the gate weights of all its assignments. The
experts with the highest scores stay. Merging adds every other one to the kept expert whose gate points most nearly
into the same direction, the average weighted by their scores (after Li 2023, "Merge, then compress").

Shapes: E experts of a layer, S of them that stay, K experts for each token, N tokens, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twohop.models.base import MoEModel
from twohop.models.moe import MoELayer
from twohop.models.routers import Routing
from twohop.models.routers.base import Gate


@contextmanager
def gate_weights(model: MoEModel) -> Iterator[dict[str, Tensor]]:
    """While open, adds up the gate weights of every expert's assignments: {layer name: fp64 [E]}.

    Of this rank's tokens, and as the router gives them, before any capacity.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, router: nn.Module, given: Any, routing: Routing) -> None:
        weights_NK = routing.weights_NK.double().masked_fill(routing.ids_NK < 0, 0.0)
        sums[name].index_add_(0, routing.ids_NK.clamp(min=0).flatten(), weights_NK.flatten())

    hooks = []
    for name, layer in model.moe_layers():
        device = next(layer.parameters()).device
        sums[name] = torch.zeros(layer.dispatcher.num_experts, dtype=torch.float64, device=device)
        hooks.append(layer.router.register_forward_hook(partial(add, name)))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def check_gate(name: str, layer: MoELayer) -> None:
    """Raise ValueError unless the router of this layer is a gate with a row for every expert."""
    router = layer.router
    if not isinstance(getattr(router, "gate", None), Gate):
        raise ValueError(f"{name}: the {layer.config.router.name} router has no gate that could do with fewer experts")


def compress(layer: dict[str, Tensor], score_E: Tensor, keep: int, merge: bool) -> dict[str, Tensor]:
    """The tensors of a layer with its `keep` best experts, in their old order.

    Args:
        layer: tensors of the whole layer by name; those of experts and router begin with the dimension E, and
            "router.gate.weight" [E, D] is among them.
        score_E: what each expert is worth; at least 0.
        keep: how many experts stay, between 1 and E.
        merge: add the other experts to the kept ones instead of dropping them.
    """
    stay_S = score_E.topk(keep).indices.sort().values
    home_E = _homes(layer["router.gate.weight"], stay_S) if merge else None
    made = {}
    for name, tensor in layer.items():
        if not name.startswith(("experts.", "router.")) or tensor.shape[:1] != score_E.shape:
            made[name] = tensor
        elif home_E is not None and name.startswith("experts."):
            made[name] = _average(tensor, score_E, home_E, stay_S)
        else:
            made[name] = tensor[stay_S]
    return made


def _homes(gate_ED: Tensor, stay_S: Tensor) -> Tensor:
    """The place among the kept experts that each expert is added to: int64 [E]; a kept one stays in its own."""
    direction_ED = F.normalize(gate_ED.double(), dim=-1)
    home_E = (direction_ED @ direction_ED[stay_S].T).argmax(-1)
    home_E[stay_S] = torch.arange(len(stay_S), device=stay_S.device)
    return home_E


def _average(tensor: Tensor, score_E: Tensor, home_E: Tensor, stay_S: Tensor) -> Tensor:
    """[E, …] → [S, …]: the means of those that share a home, weighted by their scores."""
    share_E = score_E.clone()
    share_E[stay_S] = share_E[stay_S].clamp(min=torch.finfo(share_E.dtype).tiny)  # where nobody in a home was used
    total_S = torch.zeros_like(share_E[stay_S]).index_add(0, home_E, share_E)
    share_E = share_E / total_S[home_E]
    weighted = tensor.double() * share_E.view(-1, *[1] * (tensor.dim() - 1))
    return torch.zeros_like(weighted[stay_S]).index_add(0, home_E, weighted).to(tensor.dtype)
