"""Attention of every kind, behind one call: `build_attention`."""

from twohop.models.attention.base import AttentionBase
from twohop.models.attention.build import build_attention
from twohop.models.attention.cache import Cache, KVCache
from twohop.models.attention.documents import Documents
from twohop.models.attention.rope import Rope, rope_angles, rotate
from twohop.models.attention.softmax import Attention

__all__ = [
    "Attention",
    "AttentionBase",
    "Cache",
    "Documents",
    "KVCache",
    "Rope",
    "build_attention",
    "rope_angles",
    "rotate",
]
