"""Rotary positions (Su 2021, RoFormer), and their frequencies for contexts longer than those of the training.

Shapes: B sequences, T positions, H heads, A rotated width of a head.
"""

import math

import torch
from torch import Tensor

from twohop.models.config import RopeScaling, RopeScalingKind

Rope = tuple[Tensor, Tensor]


def rope_angles(
    positions: Tensor, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> Rope:
    """cos and sin of position · theta^(-2i / A) for i < A/2: [..., A/2] each for positions [...].

    Frequencies and size are as `scaling` says.
    """
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=dtype) / width
    frequencies = theta**-exponents
    size = 1.0
    if scaling is not None and scaling.kind is not RopeScalingKind.none:
        frequencies = _scaled(frequencies, width, theta, scaling)
        size = scaling.rotation_factor
    angles = positions.to(dtype)[..., None] * frequencies
    return angles.cos() * size, angles.sin() * size


def rotate(x_BHTA: Tensor, rope: Rope | None) -> Tensor:
    """Rotates the pairs (x_i, x_{i + A/2}) by their angles: the pairing of Llama's and GPT-NeoX's weights.

    None leaves them as they are.
    """
    if rope is None:
        return x_BHTA
    cos, sin = rope
    first, second = x_BHTA.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x_BHTA.dtype)


def _scaled(frequencies: Tensor, width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Low frequencies are divided by `factor`, high ones kept, those between interpolated; `linear` divides all."""
    slowed = frequencies / scaling.factor
    if scaling.kind is RopeScalingKind.linear:
        return slowed
    length = scaling.original_max_seq_len or 1
    if scaling.kind is RopeScalingKind.llama3:
        turns = length * frequencies / (2 * math.pi)  # of a pair over the original context
        keep = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    else:  # yarn
        low, high = (
            width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        pair = torch.arange(width // 2, device=frequencies.device, dtype=frequencies.dtype)
        keep = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return slowed * (1 - keep) + frequencies * keep
