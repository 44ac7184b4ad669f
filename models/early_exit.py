"""Early exit by confidence: a token that the head is sure of after some block goes no further.

A token leaves after the first block at which the largest probability that the head gives its state exceeds a
threshold (Schuster 2022, CALM). Its state stays what it was: the blocks that follow still make keys and values of it,
for the tokens that attend to it, but no feed-forward network and no expert sees it.

Shapes: B sequences, T positions, N = B·T tokens, D model width, M tokens that have not left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twohop.models.routers.base import Routing, count_assignments
from twohop.models.transformer import Block, Transformer


class Exits:
    """Which tokens of the current forward pass go on, and how many blocks each went through."""

    def __init__(self, model: Transformer, confidence: float) -> None:
        self.model, self.confidence = model, confidence
        self.going_BT = self.depth_BT = torch.empty(0)  # bool; int64
        self._shape = torch.Size()  # of the input of the feed-forward network that is running

    def enter(self, block: Block, given: tuple) -> None:
        """Before the first block: all tokens go on."""
        self.going_BT = torch.ones(given[0].shape[:2], dtype=torch.bool, device=given[0].device)
        self.depth_BT = torch.zeros_like(self.going_BT, dtype=torch.int64)

    def leave(self, block: Block, given: tuple, made: tuple) -> tuple:
        """After every block: those that had left keep their state, and those that the head is sure of leave."""
        x_BTD = torch.where(self.going_BT[..., None], made[0], given[0])
        self.depth_BT += self.going_BT
        logits_MV = self.model.read_out(x_BTD[self.going_BT])
        sure_M = logits_MV.float().softmax(-1).amax(-1) > self.confidence
        self.going_BT = self.going_BT.masked_scatter(self.going_BT, ~sure_M)
        return (x_BTD, *made[1:])

    def withhold(self, router: nn.Module, given: tuple, routing: Routing) -> Routing:
        """After a router: a token that has left is sent to no expert, and takes no place in a capacity."""
        ids_NK = routing.ids_NK.masked_fill(~self.going_BT.flatten()[:, None], -1)
        return routing._replace(ids_NK=ids_NK, load_E=count_assignments(ids_NK, len(routing.load_E)))

    def gather(self, network: nn.Module, given: tuple) -> tuple:
        """Before a feed-forward network: only the tokens that go on, [M, D]."""
        self._shape = given[0].shape
        return (given[0].flatten(0, -2)[self.going_BT.flatten()],)

    def scatter(self, network: nn.Module, given: tuple, made_MD: Tensor) -> Tensor:
        """After it: zeros for those that have left, whose state is restored anyway."""
        y_ND = made_MD.new_zeros(self.going_BT.numel(), made_MD.shape[-1])
        y_ND[self.going_BT.flatten()] = made_MD
        return y_ND.view(self._shape)


@contextmanager
def early_exit(model: Transformer, confidence: float) -> Iterator[Exits]:
    """While open, tokens leave `model` early; `depth_BT` of the result tells where, after each forward pass.

    Every rank calls every MoE layer as before, also when all of its tokens have left.
    """
    exits = Exits(model, confidence)
    hooks: list[Any] = [model.blocks[0].register_forward_pre_hook(exits.enter)]
    for block in model.blocks:
        assert isinstance(block, Block)
        hooks.append(block.register_forward_hook(exits.leave))
        networks = [block.moe.shared, block.moe.residual and block.moe.residual.mlp] if block.is_moe else [block.mlp]
        for network in networks:
            if network is not None:
                hooks.append(network.register_forward_pre_hook(exits.gather))
                hooks.append(network.register_forward_hook(exits.scatter))
        if block.is_moe:
            hooks.append(block.moe.router.register_forward_hook(exits.withhold))
    try:
        yield exits
    finally:
        for hook in hooks:
            hook.remove()
