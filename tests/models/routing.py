"""Routers whose tokens are their own logits, for tests that compare decisions."""

import torch

from twohop.models.config import RouterConfig
from twohop.models.routers import Router, Routing, TokenInfo, build_router

SEEDS = range(100)


def make_router(num_experts: int = 8, **options) -> Router:
    """A router whose gate hands its input on."""
    router = build_router(RouterConfig(**options), num_experts, num_experts)
    torch.nn.init.eye_(router.gate.weight)
    return router


def make_logits(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Skewed logits [N, E]; N and E change with the seed."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_experts = 3 + seed % 30, (4, 8, 12)[seed % 3]
    skew = torch.randn(num_experts, generator=generator, dtype=dtype)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=dtype) + skew


def route(router: torch.nn.Module, x: torch.Tensor, num_sequences: int = 1) -> Routing:
    return router(x, TokenInfo(num_sequences))
