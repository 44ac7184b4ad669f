"""Decoder-only Transformers with Mixture-of-Experts layers: routers, capacity, experts, and the models made of them.

Names are imported on first use, so that reading a configuration does not import torch.
"""

from typing import TYPE_CHECKING

from twohop.comm.lazy import lazily

if TYPE_CHECKING:
    from twohop.models.config import ModelConfig, MoEConfig, RouterConfig
    from twohop.models.init import init_weights
    from twohop.models.moe import MoELayer, MoEStats
    from twohop.models.routers import Routing, build_router
    from twohop.models.sampling import generate
    from twohop.models.transformer import (
        ModelOutput,
        ParameterCounts,
        Transformer,
        build_model,
        expert_parameters,
        parameter_counts,
    )

_HOME = {
    "ModelConfig": "config",
    "MoEConfig": "config",
    "RouterConfig": "config",
    "Routing": "routers",
    "build_router": "routers",
    "MoELayer": "moe",
    "MoEStats": "moe",
    "ModelOutput": "transformer",
    "ParameterCounts": "transformer",
    "Transformer": "transformer",
    "build_model": "transformer",
    "expert_parameters": "transformer",
    "parameter_counts": "transformer",
    "init_weights": "init",
    "generate": "sampling",
}
__all__ = [
    "MoEConfig",
    "MoELayer",
    "MoEStats",
    "ModelConfig",
    "ModelOutput",
    "ParameterCounts",
    "RouterConfig",
    "Routing",
    "Transformer",
    "build_model",
    "build_router",
    "expert_parameters",
    "generate",
    "init_weights",
    "parameter_counts",
]


__getattr__ = lazily(__name__, _HOME)
