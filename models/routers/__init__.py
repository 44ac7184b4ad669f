"""Routers by name: a new router is one file here and one line in `ROUTERS`."""

from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from typing import Any

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Router, Routing, TokenInfo
from twohop.models.routers.expert_choice import ExpertChoiceRouter
from twohop.models.routers.hash import HashRouter
from twohop.models.routers.noisy import NoisyRouter
from twohop.models.routers.sigmoid import SigmoidRouter
from twohop.models.routers.sinkhorn import SinkhornRouter
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter
from twohop.models.routers.switch import SwitchRouter
from twohop.models.routers.task import SentenceRouter, TaskRouter
from twohop.models.routers.topk_softmax import TopKSoftmaxRouter

__all__ = ["ROUTERS", "Router", "Routing", "TokenInfo", "build_router"]

ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxTopKRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "switch": SwitchRouter,
    "noisy": NoisyRouter,
    "sigmoid": SigmoidRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "hash": HashRouter,
    "task": TaskRouter,
    "sentence": SentenceRouter,
}


def build_router(
    config: RouterConfig, dim: int, num_experts: int, vocab_size: int | None = None, num_tasks: int | None = None
) -> Router:
    """The router called `config.name`: a module from tokens [N, D] and `TokenInfo` to `Routing`.

    Raises ValueError for an unknown name, for options that this router does not have, or when it needs the
    vocabulary or the tasks, and the model has none.
    """
    if config.name not in ROUTERS:
        raise ValueError(f"model.moe.router.name={config.name!r} is not a router: use one of {', '.join(ROUTERS)}")
    router = ROUTERS[config.name]
    for option in fields(config):
        value = getattr(config, option.name)
        # Zero is no request: a default that is not zero can be switched off for any router.
        if option.name not in {"name", "top_k", *router.options} and value and value != option.default:
            raise ValueError(
                f"model.moe.router.{option.name}={_written(value)}: the {config.name} router has no such option; "
                "leave it out"
            )
    known = {"vocab_size": vocab_size, "num_tasks": num_tasks}
    for size in router.sizes:
        if known[size] is None:
            raise ValueError(f"model.{size}=null: the {config.name} router needs it; set it, or use another router")
    make: Callable[..., Router] = router
    return make(config, dim, num_experts, **{size: known[size] for size in router.sizes})


def _written(value: Any) -> Any:
    """A value as a configuration writes it."""
    return value.value if isinstance(value, Enum) else str(value).lower() if isinstance(value, bool) else value
