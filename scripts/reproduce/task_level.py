#!/usr/bin/env python3
"""Gates by task, by sentence and by token at equal compute (Kudugunta 2021, Beyond Distillation).

    scripts/reproduce/task_level.py --json build/task_level.json

Published: gates by task come close to gates by token (better in the mean over languages, with large models), those by
sentence are worse than both. Here six tasks made from one text stand for languages; in all three variants every token
goes to 2 of 8 experts, in either stack.
"""

import statistics
from collections.abc import Sequence

from common import Trained, arguments, open_study, spread, table, train, values, write_json

BASE = (
    "experiment=task_moe", "model.dim=96", "model.ffn_dim=192", "data.max_mib=1", "train.steps=300", "train.seq_len=32",
    "train.global_batch=32", "train.micro_batch=32", "optim.lr=3e-3", "eval.every=0", "eval.batches=12",
    "checkpoint.every=0", "launch.nproc=1",
)  # fmt: skip
ROUTERS = {"task": "task", "sentence": "sentence", "token": "softmax_topk"}


def by_task(runs: Sequence[Trained], task: str) -> list[float]:
    """Validation losses of one task."""
    return [run.summary["valid_loss_by_task"][task] for run in runs]


def main() -> None:
    """Train all, print how they compare."""
    with open_study(arguments(__doc__)) as options:
        trained = {
            name: train(
                options, name, *BASE, f"model.moe.router.name={router}", f"model.encoder.moe.router.name={router}"
            )
            for name, router in ROUTERS.items()
        }
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
