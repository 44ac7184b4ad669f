"""torch.compile of a model's dense parts, region by region: attention, norms, dense networks, experts' activation.

A region ends where rows travel: exchanges, routing and the experts' grouped products stay as they are. So each region
is one graph without a break, and layers that look alike share their code.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from twohop.models import MoEModel
from twohop.models.attention import AttentionBase
from twohop.models.experts import Experts
from twohop.models.feed_forward import FeedForward
from twohop.trainer.errors import ConfigError


def compile_regions(model: MoEModel, backend: str = "inductor") -> None:
    """Compile the dense parts of `model` for training passes, each when it is first called.

    Call it before activation checkpointing and engines wrap the model, whose hooks then stay outside of the regions.

    Raises:
        ConfigError: there is no compiler for the model's device.
    """
    if backend == "inductor":
        _check_compiler(next(model.parameters()).device.type)
    # Layers may differ, and then each has a graph of its own; with too few graphs there would be an error.
    torch._dynamo.config.recompile_limit = 256
    for module in _regions(model):
        module.forward = _while_training(module, module.forward, backend)
    for module in model.modules():
        if isinstance(module, Experts):
            # The number of rows changes with every pass.
            module.activate = _while_training(module, module.activate, backend, dynamic=True)  # type: ignore[method-assign]


def _regions(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, (AttentionBase, FeedForward, nn.RMSNorm)):
        return [module]
    return [region for child in module.children() for region in _regions(child)]


def _while_training(
    module: nn.Module, compute: Callable[..., Any], backend: str, dynamic: bool | None = None
) -> Callable[..., Any]:
    """`compute`, a method of `module`; compiled in training passes. Others come in too many shapes to be worth it."""
    compiled = torch.compile(compute, backend=backend, fullgraph=True, dynamic=dynamic)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if module.training and torch.is_grad_enabled() else compute)(*args, **kwargs)

    return forward


def _check_compiler(device: str) -> None:
    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError(
                "train.compile=true: there is no C++ compiler on this machine: install g++, or name one in CXX, or "
                "leave train.compile out"
            ) from None
    elif not has_triton():
        raise ConfigError(f"train.compile=true: code for {device} needs Triton: install it, or leave train.compile out")
