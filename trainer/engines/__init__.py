"""Engines: what parallelism does to parameters, gradients and updates. Found by name in `ENGINES`."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from twohop.models import MoEModel
from twohop.models.moe import MoELayer
from twohop.trainer.config import Config
from twohop.trainer.engines.ddp import DdpEngine
from twohop.trainer.engines.fsdp import FsdpEngine
from twohop.trainer.errors import ConfigError


class Engine(Protocol):
    """Owns the optimizer and everything that ranks do together between a loss and the updated weights.

    All gradient reductions are sums: the caller's loss is already divided by the global number of tokens. So loss,
    gradient norm, clipping and updated weights are those of one process that sees the whole global batch.
    """

    model: MoEModel

    def autocast(self) -> AbstractContextManager:
        """The precision in which forward passes run."""
        ...

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradients of one micro-batch, the `last` of a step or not. Collective over the world."""
        ...

    def step(self, lr_factor: float) -> float:
        """Reduce, clip, update with learning rate peak · lr_factor, and drop the gradients. Collective over the world.

        Returns the true global gradient norm before clipping, the same bits on every rank. If it is not finite
        the weights stay as they were.
        """
        ...

    def model_state(self) -> dict[str, Tensor]:
        """The parameters as tensors by name, sharded ones as DTensors; loading writes into them."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state in the same form; it may be a copy. Every rank must call this."""
        ...

    def restored(self, state: dict[str, Tensor]) -> None:
        """Take over what was loaded into the tensors of `model_state` and `optimizer_state`.

        Every rank must call this.
        """
        ...

    def move_experts(self, layer: MoELayer, move: Callable[[Tensor], Tensor]) -> None:
        """Let `move` bring the weights of a layer's experts, and all state that belongs to them, to other slots.

        `move` takes and returns a rank's rows [local experts, ...], or its share of them. Every rank must call this.
        """
        ...


def _deepspeed(model: MoEModel, config: Config) -> Engine:
    # The import takes a second and decides at once what devices it will use.
    os.environ["DS_ACCELERATOR"] = next(model.parameters()).device.type
    from twohop.trainer.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config)


ENGINES: dict[str, Callable[[MoEModel, Config], Engine]] = {
    "ddp": DdpEngine,
    "deepspeed": _deepspeed,
    "fsdp": FsdpEngine,
}


def build_engine(model: MoEModel, config: Config) -> Engine:
    """The engine `config.engine.name` around `model`. Every rank of the world must call this."""
    if config.engine.name not in ENGINES:
        raise ConfigError(f"engine.name={config.engine.name} is unknown: use one of {sorted(ENGINES)}")
    return ENGINES[config.engine.name](model, config)
