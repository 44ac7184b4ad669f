#!/usr/bin/env python3
"""Capacity that follows the load, and assignments that repeat in place of the router.

    scripts/reproduce/dynamoe.py --json build/dynamoe.json

Published (Kossmann 2022, DynaMoE): a capacity recompiled to the smallest that drops nothing saves padding against a
static factor, and, with a fixed data set, cached assignments save routing without loss of quality.

The first table: drops, and slots (rows that a system that pads would allocate, with one capacity for all micro-batches
of a step) as a multiple of the assignments, which is the mean capacity factor; 1 is a perfectly balanced layer.
The second: 14 batches that come again 14 times, experts on two ranks; how much of the training ran without a router.
"""

import re
from statistics import mean
from typing import Any

from common import SMALL_LM, Trained, arguments, open_study, spread, table, train, values, write_json

from twohop.trainer.monitoring.metrics import read_metrics

MOE = ("model.moe.experts=8", "model.moe.router.top_k=2", "train.steps=120")
CAPACITY = {
    "static C = 1.25": ("model.moe.capacity_factor=1.25",),
    "static C = 2": ("model.moe.capacity_factor=2",),
    "dynamic": ("model.moe.capacity_policy=dynamic",),
    "schedule, margin 1.1": ("model.moe.capacity_policy=schedule",),
}
AGAIN = ("data.order=batches", "data.max_mib=0.03", "train.steps=200", "launch.nproc=2", "comm.ranks_per_node=1")
CACHE = {
    "live": (),
    "cached, trigger 0.9": ("model.moe.cache.enabled=true",),
    "cached, trigger 0.7": ("model.moe.cache.enabled=true", "model.moe.cache.trigger=0.7"),
}


def steps_of(run: Trained) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.folder) if record["kind"] == "train"]


def of_layers(run: Trained, key: str) -> float:
    """The mean over steps and layers."""
    return mean(layer.get(key, 0.0) for record in steps_of(run) for layer in record["moe"].values())


def last_factors(run: Trained) -> str:
    """Capacity factor of each layer, mean of the last 50 steps."""
    steps = steps_of(run)[-50:]
    return " / ".join(f"{mean(record['moe'][name]['capacity'] for record in steps):.2f}" for name in steps[0]["moe"])


def last_loss(run: Trained) -> float:
    """Training loss, mean of the last 14 steps: each batch about once."""
    return mean(record["loss"] for record in steps_of(run)[-14:])


def megabytes(run: Trained) -> float:
    """Of counts and metadata between the ranks, forward and backward."""
    phases = ("counts", "metadata", "metadata backward")
    sent = (record["traffic"]["between nodes"] for record in steps_of(run))
    return sum(step.get(phase, [0, 0])[0] for step in sent for phase in phases) / 1e6


def main() -> None:
    with open_study(arguments(__doc__)) as options:
        rows, everything = [], []
        for name, overrides in CAPACITY.items():
            runs = train(options, re.sub(r"\W+", "_", name), *SMALL_LM, *MOE, *overrides)
            dropped = [f"{100 * of_layers(run, 'dropped'):.2f}" for run in runs]
            factors = [of_layers(run, "capacity") for run in runs]
            rows.append([name, ", ".join(dropped), spread(factors, 2), last_factors(runs[0])])
            rows[-1].append(spread(values(runs, "valid_loss")))
            everything += runs
        heads = ["capacity", "dropped, % of each seed", "slots ÷ assignments", "by layer at the end, seed 0"]
        capacity = table([*heads, "validation loss"], rows)
        print(capacity + "\n")

        rows, reference = [], []
        for name, overrides in CACHE.items():
            runs = train(options, re.sub(r"\W+", "_", name), *SMALL_LM, *MOE, *AGAIN, *overrides)
            losses, valid = [last_loss(run) for run in runs], values(runs, "valid_loss")
            reference = reference or [losses, valid]
            cells = []
            for ours, live in zip((losses, valid), reference, strict=True):
                worst = max(abs(our / their - 1) for our, their in zip(ours, live, strict=True))
                cells.append(spread(ours) + ("" if name == "live" else f" ({100 * worst:.2f} %)"))
            replayed = [100 * of_layers(run, "replayed") for run in runs]
            rows.append([name, spread(replayed, 1), *cells, spread([megabytes(run) for run in runs], 1)])
            everything += runs
        heads = ["assignments", "layers × steps without a router, %", "training loss at the end (largest change)"]
        cache = table([*heads, "validation loss (largest change)", "MB of counts and metadata"], rows)
        print(cache)
        write_json(options, everything, capacity=capacity, cache=cache)


if __name__ == "__main__":
    main()
