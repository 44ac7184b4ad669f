"""Peaks of accelerators, from their makers' data sheets: dense matrix products, in 10^12 operations a second."""

import re
from typing import NamedTuple

import torch

from twohop.trainer.config import Config, Precision


class Peak(NamedTuple):
    """One accelerator."""

    bf16: float
    fp32: float  # without TF32, which PyTorch leaves off


# By what torch.cuda.get_device_name says; the first name that occurs in it counts, so variants come first.
PEAKS = {
    "B200": Peak(2250, 75),
    "H200": Peak(989, 67),
    "H100 PCIe": Peak(756, 51),
    "H100 NVL": Peak(835, 60),
    "H100": Peak(989, 67),
    "H20": Peak(148, 44),
    "A100": Peak(312, 19.5),
    "A10G": Peak(70, 35),
    "L40S": Peak(362, 91.6),
    "L4": Peak(121, 30.3),
    "MI300X": Peak(1307, 163.4),
}


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Operations a second that `device` can do at `engine.precision`; metrics.peak_tflops wins. None: not known."""
    if config.metrics.peak_tflops is not None:
        return config.metrics.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for known, peak in PEAKS.items() if re.search(rf"\b{known}\b", name)), None)
    if peak is None:
        return None
    return 1e12 * (peak.fp32 if config.engine.precision is Precision.fp32 else peak.bf16)
