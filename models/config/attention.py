"""Which attention a model has: the kinds, and the options that each of them takes. Imports no torch."""

from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

# Every kind with the options it takes, each with the value that null stands for.
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "sliding": {"window": 64, "dilation": 1},
    "strided": {"stride": 16, "split_heads": False},
    "fixed": {"stride": 16, "summary": 4, "split_heads": False},
    "bigbird": {"window": 48, "dilation": 1, "global_tokens": 16, "random_blocks": 3, "block": 16},
    "memory": {"segment": 64, "memory": 64, "compression": 1, "compressed": 0},
    "linear": {"decay": False, "chunk": 64},
    "adaptive_span": {"window": 256, "ramp": 32, "span_loss": 2e-6},
    "latent": {"q_rank": 0, "kv_rank": 32, "nope_dim": 32, "rope_dim": 16, "value_dim": 32},
}
AT_LEAST = {
    "window": 1, "dilation": 1, "stride": 1, "summary": 1, "global_tokens": 0, "random_blocks": 0, "block": 1,
    "segment": 1, "memory": 1, "compression": 1, "compressed": 0, "chunk": 1, "ramp": 1, "span_loss": 0,
    "q_rank": 0, "kv_rank": 1, "nope_dim": 1, "rope_dim": 2, "value_dim": 1,
}  # fmt: skip


class QKNorm(Enum):
    """RMSNorm of queries and keys: none, of each head by itself (Qwen3), or of all heads as one (OLMo 2, OLMoE)."""

    none = "none"
    head = "head"
    full = "full"


@dataclass
class AttentionConfig:
    """Who sees whom. Null is the default of the kind; an option that the kind does not have is refused."""

    kind: str = "full"  # full | sliding | strided | fixed | bigbird | memory | linear | adaptive_span | latent
    qk_norm: QKNorm = QKNorm.none
    window: int | None = None  # keys that a query sees, itself included; adaptive_span: at most
    dilation: int | None = None  # distance between the keys of a window
    stride: int | None = None  # strided, fixed: the length l of Child 2019
    summary: int | None = None  # fixed: the last positions of every block, which all later positions see
    split_heads: bool | None = None  # strided, fixed: the local part for even heads, the far part for odd ones
    global_tokens: int | None = None  # bigbird: the first positions, which all see (and which, if not causal, see all)
    random_blocks: int | None = None  # bigbird: blocks of keys that a block of queries sees beyond its window
    block: int | None = None  # bigbird: the length of such a block
    segment: int | None = None  # memory: positions that are processed together
    memory: int | None = None  # memory: positions before its segment that a query sees, without gradient
    compression: int | None = None  # memory: positions that become one when they leave the memory; 1: they are dropped
    compressed: int | None = None  # memory: compressed positions that a query sees
    decay: bool | None = None  # linear: retention (RetNet), whose state decays; else a kernel with a normaliser
    chunk: int | None = None  # linear: positions that are computed together; changes the speed alone
    ramp: int | None = None  # adaptive_span: positions over which a head's span fades out
    span_loss: float | None = None  # adaptive_span: weight of a layer's mean span, in positions
    q_rank: int | None = None  # latent: width of the vector that a position's queries are made of; 0: its whole state
    kv_rank: int | None = None  # latent: width of the vector that a position's keys and values are made of
    nope_dim: int | None = None  # latent: width of a head's queries and keys without position
    rope_dim: int | None = None  # latent: width of their rotated part
    value_dim: int | None = None  # latent: width of a head's values

    def __post_init__(self) -> None:
        if self.kind not in OPTIONS:
            close = get_close_matches(self.kind, OPTIONS, 1)
            meant = f", did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"model.attention.kind={self.kind}: unknown{meant}; use one of {', '.join(OPTIONS)}")
        options = OPTIONS[self.kind]
        for key in {key: None for taken in OPTIONS.values() for key in taken}:
            value = getattr(self, key)
            if value is None:
                setattr(self, key, options.get(key))
            elif key not in options:
                users = [kind for kind, taken in OPTIONS.items() if key in taken]
                raise ValueError(
                    f"model.attention.{key}={value} has no use with kind={self.kind}: "
                    f"leave it out, or use kind={' or '.join(users)}"
                )
            elif key in AT_LEAST and value < AT_LEAST[key]:
                raise ValueError(f"model.attention.{key}={value}: use {AT_LEAST[key]} or more")
        self._check_fixed()
        self._check_memory()
        self._check_latent()

    def _check_fixed(self) -> None:
        if self.summary is not None and self.stride is not None and self.summary > self.stride:
            raise ValueError(
                f"model.attention.summary={self.summary} is more than the stride={self.stride} positions of a block: "
                "lower summary or raise stride"
            )

    def _check_memory(self) -> None:
        if self.compression is None:
            return
        if (self.compression > 1) != bool(self.compressed):
            raise ValueError(
                f"model.attention.compression={self.compression} with compressed={self.compressed}: use compression=1 "
                "with compressed=0 for no compressed memory, or more than 1 with more than 0"
            )
        for key in ("segment", "memory"):
            value = getattr(self, key)
            if value % self.compression:
                raise ValueError(
                    f"model.attention.{key}={value} is no multiple of compression={self.compression}: "
                    f"use {-(-value // self.compression) * self.compression}"
                )

    def _check_latent(self) -> None:
        if self.rope_dim is None:
            return
        if self.rope_dim % 2:
            raise ValueError(f"model.attention.rope_dim={self.rope_dim} is odd: RoPE rotates pairs, use an even one")
        if self.qk_norm is not QKNorm.none:
            raise ValueError(
                f"model.attention.qk_norm={self.qk_norm.value} has no use with kind=latent, which norms its latents: "
                "leave it out"
            )
