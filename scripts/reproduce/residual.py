#!/usr/bin/env python3
"""A residual MLP beside one expert against two experts: loss, and bytes of dispatch (Rajbhandari 2022, DeepSpeed-MoE).

    scripts/reproduce/residual.py --json build/residual.json

Published: the loss of top-2 at the communication of top-1. Losses are of one process. Bytes are those of rows on their
way to the experts, forward, over 20 more steps of the first seed in 4 processes: of one expert each (4 in a layer), and
of two each, where a token of `top2` whose experts share a rank is sent there once.
"""

import argparse

from common import SMALL_LM, Trained, arguments, loss_table, open_study, table, train, write_json

from twohop.trainer.monitoring.metrics import read_metrics

VARIANTS = {
    "top2": ("model.moe.experts=8", "model.moe.router.top_k=2", "model.moe.router.renormalize=true"),
    "residual": ("model.moe.experts=8", "model.moe.router.top_k=1", "model.moe.residual=sum"),
}
ON_4_RANKS = ("launch.nproc=4", "comm.ranks_per_node=1", "comm.dispatcher=flat", "train.steps=20")


def bytes_per_token(options: argparse.Namespace, name: str, experts: int) -> tuple[Trained, float]:
    """The run, and the bytes that a layer sends to the experts of other ranks for each token."""
    one_seed = argparse.Namespace(**vars(options) | {"seeds": 1})
    overrides = (*SMALL_LM, *VARIANTS[name], *ON_4_RANKS, f"model.moe.experts={experts}")
    (run,) = train(one_seed, f"{name}_{experts}_experts_on_4_ranks", *overrides)
    steps = [record for record in read_metrics(run.folder) if record["kind"] == "train"]
    layers_and_tokens = sum(record["targets"] * len(record["moe"]) for record in steps)
    return run, sum(record["traffic"]["between nodes"]["dispatch"][0] for record in steps) / layers_and_tokens


def main() -> None:
    with open_study(arguments(__doc__)) as options:
        variants = {name: train(options, name, *SMALL_LM, *overrides) for name, overrides in VARIANTS.items()}
        sent = {experts: {name: bytes_per_token(options, name, experts) for name in VARIANTS} for experts in (4, 8)}
        print(loss_table(variants))
        rows = []
        for experts, by_name in sent.items():
            (_, two), (_, one) = by_name["top2"], by_name["residual"]
            rows.append([str(experts // 4), f"{two:.1f}", f"{one:.1f}", f"{one / two:.3f}"])
        heads = ["experts of a rank", "top2: bytes a token and layer", "residual", "ratio"]
        print(f"\n{table(heads, rows)}")
        runs = [run for runs in variants.values() for run in runs]
        write_json(options, runs, dispatch={n: {k: v for k, (_, v) in by.items()} for n, by in sent.items()})


if __name__ == "__main__":
    main()
