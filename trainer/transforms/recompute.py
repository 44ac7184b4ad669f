"""Activation checkpointing: less memory for activations, paid with arithmetic in the backward pass (Chen 2016).

Applied to a model from outside, by replacing the `forward` of some of its modules, so that names of parameters and the
hooks of an engine stay as they are. What a router has decided is never decided again: a block that is made again
follows the plan of its forward pass, without router, noise, counts or assignments, and its losses and loads are those
of the forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from twohop.comm import Planned
from twohop.models import MoEModel
from twohop.models.attention import AttentionBase
from twohop.models.experts import Experts
from twohop.models.feed_forward import FeedForward
from twohop.models.moe import MoELayer, MoEStats
from twohop.models.routers import TokenInfo
from twohop.trainer.config import Recompute

# What `selective` keeps: the results of nearly all arithmetic, but nothing that is made of them number by number.
KEPT_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def recompute_activations(model: MoEModel, mode: Recompute) -> None:
    """Make training passes of `model` forget what `mode` says and compute it again in backward, to the same bits.

    Call it once, before an engine wraps the model. `full` carries rows to the experts again, in the same order on all
    ranks; the other modes add no communication.
    """
    if mode is Recompute.full:
        for block in model.every_block():
            block.forward = _checkpointed(block, block.forward, noop_context_fn)
    elif mode is not Recompute.none:
        keep_products = partial(create_selective_checkpoint_contexts, KEPT_OPS)
        context_fn = keep_products if mode is Recompute.selective else noop_context_fn
        for module in model.modules():
            if isinstance(module, (AttentionBase, FeedForward)):
                module.forward = _checkpointed(module, module.forward, context_fn)  # type: ignore[method-assign]
            elif isinstance(module, Experts):
                module.network = _checkpointed(module, module.network, context_fn)  # type: ignore[method-assign]


def _checkpointed(module: nn.Module, compute: Callable[..., Any], context_fn: Callable[[], Any]) -> Callable[..., Any]:
    """`compute`, a method of `module`, which the backward pass of a training pass runs again."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return compute(*args, **kwargs)
        return checkpoint(_Pass(module, compute), *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    return forward


class _Pass:
    """A pass through a module and its repetitions, which change nothing but the tensors that autograd has saved."""

    def __init__(self, module: nn.Module, compute: Callable[..., Any]) -> None:
        self.compute, self.is_first = compute, True
        self.routings = [_Routing(part) for part in module.modules() if isinstance(part, MoELayer)]
        self.attentions = [part for part in module.modules() if isinstance(part, AttentionBase)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_first, self.is_first = self.is_first, False
        with ExitStack() as stack:
            for routing in self.routings:
                stack.enter_context(routing.recorded() if is_first else routing.followed())
            if not is_first:  # losses that a layer leaves behind have been taken in the forward pass
                stack.callback(lambda: [attention.take_losses() for attention in self.attentions])
            return self.compute(*args, **kwargs)


class _Routing:
    """What the router of a layer decided in one pass, and all that came of it."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.made: tuple[Planned, MoEStats] | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Around the forward pass."""
        with self._planning_by(partial(self._record, self.layer.plan)):
            yield

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Around a repetition."""
        with self._planning_by(lambda x_ND, about: self.made):
            yield

    @contextmanager
    def _planning_by(self, plan: Callable[..., Any]) -> Iterator[None]:
        self.layer.plan = plan  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.plan  # the method of the class is there again

    def _record(self, plan: Callable[..., Any], x_ND: Tensor, about: TokenInfo) -> tuple[Planned, MoEStats]:
        # These hooks are inside those of the checkpoint, which therefore does not see, and never asks for, what the
        # router saves: it stays. Detached, since a tensor that its own node holds would never be freed.
        with saved_tensors_hooks(Tensor.detach, lambda saved: saved):
            planned, stats = plan(x_ND, about)
        self.made = planned.kept(), stats._replace(losses={})  # no graph, which would hold itself
        return planned, stats
