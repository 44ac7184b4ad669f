#!/usr/bin/env python3
"""Gates by task, by sentence and by token at equal compute (Kudugunta 2021, Beyond Distillation).

    scripts/reproduce/task_level.py --json build/task_level.json

Published: gates by task come close to gates by token (better in the mean over languages, with large models), those by
sentence are worse than both. Here six tasks made from one text stand for languages; every token goes to 2 of 8 experts
of half a dense MLP's width each. `token_task` routes by token in the encoder and by task in the decoder, `dense` has
MLPs of the same compute.
"""

import statistics
from collections.abc import Sequence

from common import Trained, arguments, open_study, spread, table, train, values, write_json

BASE = (
    "experiment=task_moe", "model.dim=96", "model.ffn_dim=192", "data.max_mib=2", "train.steps=500", "train.seq_len=32",
    "train.global_batch=48", "train.micro_batch=48", "optim.lr=3e-3", "eval.every=0", "eval.batches=20",
    "checkpoint.every=0", "launch.nproc=1",
)  # fmt: skip


def gates(encoder: str, decoder: str) -> tuple[str, ...]:
    """Overrides for routers of these names."""
    return (f"model.encoder.moe.router.name={encoder}", f"model.moe.router.name={decoder}")


VARIANTS = {
    "task": gates("task", "task"),
    "sentence": gates("sentence", "sentence"),
    "token": gates("softmax_topk", "softmax_topk"),
    "token_task": gates("softmax_topk", "task"),
    "dense": (
        "model.encoder.moe.experts=[]",
        "model.moe.experts=[]",
        "model.ffn_dim=384",
        *gates(*["softmax_topk"] * 2),
    ),
}


def by_task(runs: Sequence[Trained], task: str) -> list[float]:
    """Validation losses of one task."""
    return [run.summary["valid_loss_by_task"][task] for run in runs]


def main() -> None:
    """Train all, print how they compare."""
    with open_study(arguments(__doc__)) as options:
        trained = {name: train(options, name, *BASE, *overrides) for name, overrides in VARIANTS.items()}
        tasks = list(trained["task"][0].summary["valid_loss_by_task"])
        rows = [
            [name, spread(values(runs, "valid_loss")), spread(values(runs, "valid_accuracy"))]
            + [f"{statistics.mean(by_task(runs, task)):.3f}" for task in tasks]
            for name, runs in trained.items()
        ]
        print(table(["gates", "validation loss", "accuracy", *tasks], rows))
        write_json(options, [run for runs in trained.values() for run in runs])


if __name__ == "__main__":
    main()
