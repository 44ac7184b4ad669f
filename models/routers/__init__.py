"""Routers by name: a new router is one file here and one line in `ROUTERS`."""

from torch import nn

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Routing
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter
from twohop.models.routers.switch import SwitchRouter

__all__ = ["ROUTERS", "Routing", "build_router"]

ROUTERS = {
    "softmax_topk": SoftmaxTopKRouter,
    "switch": SwitchRouter,
}


def build_router(config: RouterConfig, dim: int, num_experts: int) -> nn.Module:
    """The router called `config.name`: a module from tokens [N, D] to `Routing`.

    Raises ValueError for an unknown name, or for options that this router does not have.
    """
    if config.name not in ROUTERS:
        raise ValueError(f"model.moe.router.name={config.name!r} is not a router: use one of {', '.join(ROUTERS)}")
    return ROUTERS[config.name](config, dim, num_experts)
