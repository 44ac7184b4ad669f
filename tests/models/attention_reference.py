"""Attention written out plainly: who sees whom as loops over sets, scores and softmax position by position.

Shapes: B sequences, T positions, S positions with a key, H heads, G key/value heads, A head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sees = Callable[[int, int, int], bool]  # (head, query, key)


def table(sees: Sees, heads: int, queries: int, keys: int) -> Tensor:
    """bool [H, T, S]."""
    return torch.tensor([[[sees(h, q, k) for k in range(keys)] for q in range(queries)] for h in range(heads)])


def sliding(window: int, dilation: int) -> Sees:
    """Longformer's window."""
    steps = {step * dilation for step in range(window)}
    return lambda h, q, k: abs(q - k) in steps


def strided(stride: int, heads: bool) -> Sees:
    """Child 2019, section 4.3: A1 = {max(0, i - l), ..., i}, A2 = {j : (i - j) mod l = 0}; or a head each."""

    def sees(h: int, q: int, k: int) -> bool:
        near, far = q - stride <= k <= q + stride, (q - k) % stride == 0
        return (near, far)[h % 2] if heads else near or far

    return sees


def fixed(stride: int, summary: int, heads: bool) -> Sees:
    """Child 2019, section 4.3: A1 = {j : floor(j / l) = floor(i / l)}, A2 = {j : j mod l in the last c of l}."""

    def sees(h: int, q: int, k: int) -> bool:
        near, far = k // stride == q // stride, k % stride in range(stride - summary, stride)
        return (near, far)[h % 2] if heads else near or far

    return sees


def rope(x_BHTA: Tensor, positions: list[float], theta: float) -> Tensor:
    """Rotation by complex numbers."""
    half = x_BHTA.shape[-1] // 2
    z = torch.complex(x_BHTA[..., :half], x_BHTA[..., half:])
    angles = torch.tensor([[p * theta ** (-i / half) for i in range(half)] for p in positions], dtype=x_BHTA.dtype)
    z = z * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag], -1)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight


def project(module: torch.nn.Module, x_BTD: Tensor, name: str) -> Tensor:
    """Heads of the queries, keys or values, normed as the module says; those of a group repeated: [B, H, T, A]."""
    weights, width = dict(module.named_parameters()), module.head_dim
    x = x_BTD @ weights[f"w{name}.weight"].T
    norm = weights.get(f"{name}_norm.weight")
    if norm is not None and len(norm) == x.shape[-1] and len(norm) != width:
        x, norm = rms_norm(x, norm), None
    heads = [x[..., i : i + width] for i in range(0, x.shape[-1], width)]
    heads = [head if norm is None else rms_norm(head, norm) for head in heads]
    num_heads = len(weights["wq.weight"]) // width
    return torch.stack([heads[h * len(heads) // num_heads] for h in range(num_heads)], 1)


def join(module: torch.nn.Module, y_BHTA: Tensor) -> Tensor:
    """[B, H, T, A] → [B, T, D]."""
    return torch.cat(list(y_BHTA.unbind(1)), -1) @ module.wo.weight.T


def softmax_attention(
    q_BHTA: Tensor, k_BHSA: Tensor, v_BHSA: Tensor, seen_HTS: Tensor, weight_HTS: Tensor | None = None
) -> Tensor:
    """Σ w exp(q·k / √A) v / Σ w exp(q·k / √A) over the keys that are seen, query by query; 0 where none is."""
    rows = []
    for t in range(q_BHTA.shape[2]):
        scores_BHS = (q_BHTA[:, :, t, None] * k_BHSA).sum(-1) / math.sqrt(q_BHTA.shape[-1])
        powers_BHS = scores_BHS.exp() * seen_HTS[..., t, :]
        if weight_HTS is not None:
            powers_BHS = powers_BHS * weight_HTS[:, t]
        shares_BHS = powers_BHS / powers_BHS.sum(-1, keepdim=True).clamp(min=1e-30)
        rows.append((shares_BHS[..., None] * v_BHSA).sum(2))
    return torch.stack(rows, 2)
