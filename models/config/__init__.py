"""What a model is made of, as plain dataclasses.

This module imports neither torch nor a config system, so that a command line can show its help at once.
Every `__post_init__` refuses an impossible value with a `ValueError` that names key, value and cure.
"""

from twohop.models.config.attention import AttentionConfig, QKNorm
from twohop.models.config.model import Activation, EncoderConfig, ModelConfig, ModelKind, VisionConfig
from twohop.models.config.moe import (
    AssignmentCacheConfig,
    BalanceOver,
    BatchPriority,
    CapacityPolicy,
    CapacityRounding,
    MoEConfig,
    Residual,
    RouterConfig,
)
from twohop.models.config.rope import RopeScaling, RopeScalingKind

__all__ = [
    "Activation",
    "AssignmentCacheConfig",
    "AttentionConfig",
    "BalanceOver",
    "BatchPriority",
    "CapacityPolicy",
    "CapacityRounding",
    "EncoderConfig",
    "MoEConfig",
    "ModelConfig",
    "ModelKind",
    "QKNorm",
    "Residual",
    "RopeScaling",
    "RopeScalingKind",
    "RouterConfig",
    "VisionConfig",
]
