#!/usr/bin/env python3
"""PR-MoE against a Mixture of Experts of many more parameters (Rajbhandari 2022, DeepSpeed-MoE).

    scripts/reproduce/pr_moe.py --json build/pr_moe.json

Published: PR-MoE-32/64 reaches the loss of MoE-128 with less than a third of its parameters. Here: 4 experts, 8 in the
last layer, each beside a dense MLP, against 16 in every layer. As in the paper a token of PR-MoE uses two networks of
a layer and a token of the other one; `moe_top2` uses two as well.
"""

from common import compare

VARIANTS = {
    "moe": ("model.moe.experts=16", "model.moe.router.top_k=1"),
    "moe_top2": ("model.moe.experts=16", "model.moe.router.top_k=2", "model.moe.router.renormalize=true"),
    "pr_moe": (
        """model.moe.experts='pyramid(4, 8, last=1)'""",
        "model.moe.router.top_k=1",
        "model.moe.residual=sum",
    ),
}

if __name__ == "__main__":
    compare(__doc__, VARIANTS)
