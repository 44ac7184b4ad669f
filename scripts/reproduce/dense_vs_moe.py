#!/usr/bin/env python3
"""Dense against Mixture-of-Experts at equal compute for each token (Shazeer 2017, Fedus 2021, Rajbhandari 2022).

    scripts/reproduce/dense_vs_moe.py --json build/dense_vs_moe.json

Published: at equal compute, experts reach a lower loss. `dense` has MLPs of 256; `switch` 8 such MLPs, of which a token
uses one, times its probability; `residual` an MLP of 128 for all tokens and one of 8 experts of 128; `top2` 8 experts
of 128, of which a token uses two.
"""

from common import compare

VARIANTS = {
    "dense": ("model.ffn_dim=256",),
    "switch": ("model.ffn_dim=256", "model.moe.experts=8", "model.moe.router.top_k=1"),
    "top2": ("model.moe.experts=8", "model.moe.router.top_k=2", "model.moe.router.renormalize=true"),
    "residual": ("model.moe.experts=8", "model.moe.router.top_k=1", "model.moe.residual=sum"),
}

if __name__ == "__main__":
    compare(__doc__, VARIANTS)
