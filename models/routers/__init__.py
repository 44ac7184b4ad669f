"""Routers by name: a new router is one file here and one line in `ROUTERS`."""

from twohop.models.config import RouterConfig
from twohop.models.routers.base import Router, Routing, TokenInfo
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter
from twohop.models.routers.switch import SwitchRouter

__all__ = ["ROUTERS", "Router", "Routing", "TokenInfo", "build_router"]

ROUTERS: dict[str, type] = {
    "softmax_topk": SoftmaxTopKRouter,
    "switch": SwitchRouter,
}


def build_router(config: RouterConfig, dim: int, num_experts: int) -> Router:
    """The router called `config.name`: a module from tokens [N, D] and `TokenInfo` to `Routing`.

    Raises ValueError for an unknown name, or for options that this router does not have.
    """
    if config.name not in ROUTERS:
        raise ValueError(f"model.moe.router.name={config.name!r} is not a router: use one of {', '.join(ROUTERS)}")
    router: Router = ROUTERS[config.name](config, dim, num_experts)
    return router
