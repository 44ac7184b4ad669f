"""Attention layers with random weights, for tests.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A head width.
"""

import torch
from torch import Tensor

from tests.models import attention_reference as plain
from twohop.models import ModelConfig
from twohop.models.attention import build_attention, rope_angles
from twohop.models.config.attention import AttentionConfig

T, DIM, HEADS = 40, 16, 4


def config_of(num_kv_heads: int | None = 2, **options) -> ModelConfig:
    if options.get("kind") == "latent":
        num_kv_heads = None
    return ModelConfig(
        vocab_size=30, max_seq_len=T, dim=DIM, num_layers=3, num_heads=HEADS, num_kv_heads=num_kv_heads, ffn_dim=24,
        init_std=0.3, attention=AttentionConfig(**options),
    )  # fmt: skip


def make(config: ModelConfig, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """One attention layer with random weights; norms and spans random too, so that nothing is hidden by their start."""
    torch.manual_seed(0)
    module = build_attention(config, **options).to(dtype)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.4)
        if name == "span":
            parameter.data = torch.tensor([0.1, 0.9, -0.3, 1.2][: len(parameter)], dtype=dtype)
    return module


def make_x(length: int = T, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rope(length: int = T, head_dim: int = DIM // HEADS) -> tuple[Tensor, Tensor]:
    return rope_angles(torch.arange(length), head_dim, 10_000.0, torch.float64)


def assert_same_with_gradients(module: torch.nn.Module, ours, reference, x: Tensor) -> None:
    """Outputs, and the gradients of input and parameters under a random cotangent."""
    results = []
    for function in (ours, reference):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        names = [name for name, _ in module.named_parameters()]
        gradients = torch.autograd.grad(y, [inputs, *module.parameters()], cotangent)
        results.append({"output": y, "input": gradients[0], **dict(zip(names, gradients[1:], strict=True))})
    for name, value in results[0].items():
        assert value.abs().sum() > 0, name
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-10, msg=name)


# Masks: patterns of the papers as sets.

MASKS = {
    "full": ({}, lambda h, q, k: True),
    "sliding": ({"window": 5}, plain.sliding(5, 1)),
    "sliding, window 1": ({"window": 1}, lambda h, q, k: q == k),
    "sliding, dilated": ({"window": 4, "dilation": 3}, plain.sliding(4, 3)),
    "strided": ({"stride": 6}, plain.strided(6, heads=False)),
    "strided, heads": ({"stride": 6, "split_heads": True}, plain.strided(6, heads=True)),
    "fixed": ({"stride": 6, "summary": 2}, plain.fixed(6, 2, heads=False)),
    "fixed, heads": ({"stride": 6, "summary": 2, "split_heads": True}, plain.fixed(6, 2, heads=True)),
    "bigbird": (
        {"window": 3, "dilation": 2, "global_tokens": 4, "random_blocks": 0},
        lambda h, q, k: plain.sliding(3, 2)(h, q, k) or q < 4 or k < 4,
    ),
}  # fmt: skip
