#!/usr/bin/env python3
"""Experts in the first half of the layers against the second half (Rajbhandari 2022, DeepSpeed-MoE).

    scripts/reproduce/placement.py --json build/placement.json

Published: deeper layers gain more from experts, on which the pyramid of PR-MoE rests. Both variants have the same
parameters; a block without experts has one MLP as wide as MLP and expert of the others together.
"""

from common import compare

RESIDUAL = ("model.moe.router.top_k=1", "model.moe.residual=sum", "model.moe.ffn_dim=128")

VARIANTS = {
    "first_half": (*RESIDUAL, "model.moe.experts=[8,8,0,0]", "model.ffn_dims=[128,128,256,256]"),
    "second_half": (*RESIDUAL, "model.moe.experts=[0,0,8,8]", "model.ffn_dims=[256,256,128,128]"),
}

if __name__ == "__main__":
    compare(__doc__, VARIANTS)
