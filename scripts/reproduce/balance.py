#!/usr/bin/env python3
"""No balancing against the auxiliary loss, a selection bias, and the loss over the global batch.

    scripts/reproduce/balance.py --json build/balance.json

Published: without balancing few experts take most tokens (Shazeer 2017); a bias balances without a loss that pulls
at the model (Wang 2024, DeepSeek-V3); fractions counted over the global batch leave more room to specialise than those
of a micro-batch (Qiu 2025). Violation: the largest load of an expert in a step's global batch ÷ the mean load − 1,
averaged over layers and the last fifth of the steps.
"""

from statistics import mean

from common import Trained, Variants, compare, spread

from twohop.trainer.monitoring.metrics import read_metrics

MOE = ("model.moe.experts=8", "model.moe.router.top_k=2", "model.moe.router.renormalize=true")
NO_LOSS = "model.moe.router.load_balance_loss=0"
SIGMOID = (*MOE, "model.moe.router.name=sigmoid", NO_LOSS)

VARIANTS = {
    "none": (*MOE, NO_LOSS),
    "aux_loss": (*MOE, "model.moe.router.load_balance_loss=0.01"),
    "global_batch": (
        *MOE,
        "model.moe.router.load_balance_loss=0.01",
        "model.moe.router.load_balance_over=global_batch",
    ),
    "bias": (*SIGMOID, "model.moe.router.bias_rate=1e-3"),
}


def violation(run: Trained) -> float:
    """The mean of max load ÷ mean load − 1 over the layers of the last fifth of the steps."""
    steps = [record for record in read_metrics(run.folder) if record["kind"] == "train"]
    loads = [layer["load"] for record in steps[-(len(steps) // 5) :] for layer in record["moe"].values()]
    return mean(len(load) * max(load) - 1 for load in loads)


def columns(trained: Variants) -> dict[str, list[str]]:
    return {"violation": [spread([violation(run) for run in runs], 3) for runs in trained.values()]}


if __name__ == "__main__":
    compare(__doc__, VARIANTS, columns)
