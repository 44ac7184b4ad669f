"""Mixture-of-Experts models: routers, capacity, experts, attention, and the models made of them.

Names are imported on first use, so that reading a configuration does not import torch.
"""

from typing import TYPE_CHECKING

from twohop.comm.lazy import lazily

if TYPE_CHECKING:
    from twohop.models.base import ModelOutput, MoEModel
    from twohop.models.build import ParameterCounts, build_model, expert_parameters, parameter_counts
    from twohop.models.config import ModelConfig, MoEConfig, RouterConfig
    from twohop.models.encoder_decoder import EncoderDecoder, translate
    from twohop.models.init import init_weights
    from twohop.models.moe import MoELayer, MoEStats
    from twohop.models.routers import Routing, build_router
    from twohop.models.sampling import generate
    from twohop.models.transformer import Transformer

_HOME = {
    "ModelConfig": "config",
    "MoEConfig": "config",
    "RouterConfig": "config",
    "Routing": "routers",
    "build_router": "routers",
    "MoELayer": "moe",
    "MoEStats": "moe",
    "MoEModel": "base",
    "ModelOutput": "base",
    "ParameterCounts": "build",
    "EncoderDecoder": "encoder_decoder",
    "Transformer": "transformer",
    "build_model": "build",
    "expert_parameters": "build",
    "parameter_counts": "build",
    "init_weights": "init",
    "generate": "sampling",
    "translate": "encoder_decoder",
}
__all__ = [
    "EncoderDecoder",
    "MoEConfig",
    "MoELayer",
    "MoEModel",
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
    "translate",
]


__getattr__ = lazily(__name__, _HOME)
