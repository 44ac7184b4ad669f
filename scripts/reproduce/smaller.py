#!/usr/bin/env python3
"""Smaller models out of a trained one: loss, size and speed before and after.

    scripts/reproduce/smaller.py --json build/smaller.json

Half of the experts, pruned or merged by use × gate weight (after Li 2023, "Merge, then compress"); experts of 8 and 4
bits (torchao); tokens that leave early (Schuster 2022, CALM), of a model trained as usual and of one trained with
layer drop (Huang 2016, Fan 2019). Times are those of the first seed in turn; 1 is the model as it was trained.
"""

import argparse
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from common import SMALL_LM, Trained, arguments, configuration, evaluate, open_study, spread, table, train, write_json
from omegaconf import OmegaConf
from speed import evaluations, in_turn, texts

from twohop.models import parameter_counts
from twohop.trainer.app import to_config
from twohop.trainer.config import ExportConfig
from twohop.trainer.launching import workers
from twohop.trainer.run_folder import read_config

MODEL = (
    *SMALL_LM, "model.num_layers=6", "model.moe.every=2", "model.moe.experts=8", "model.moe.router.top_k=2",
    "model.moe.router.renormalize=true",
)  # fmt: skip
EXPORTS = {
    "pruned": ("format=pruned", "experts=4"),
    "merged": ("format=pruned", "experts=4", "merge=true"),
    "int8": ("format=quantized", "bits=8"),
    "int4": ("format=quantized", "bits=4"),
}
CONFIDENCES = (0.9, 0.7, 0.5)


def export(options: argparse.Namespace, name: str, run: Trained) -> tuple[Trained, int]:
    """`twohop export` of the run, in this process: the new run, and the bytes of its weights."""
    out: Path = options.runs / name / f"seed-{run.seed}"
    shutil.rmtree(out, ignore_errors=True)
    changed = OmegaConf.from_dotlist([*EXPORTS[name], f"out={out}", "launch.nproc=1", "comm.ep_size=null"])
    merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), read_config(run.folder), changed)
    with redirect_stdout(sys.stderr):
        written = workers.export(to_config(merged, ExportConfig), run.folder)
    return Trained(name, run.seed, out, {}), written["bytes"]


def smaller(options: argparse.Namespace, full: list[Trained]) -> dict[str, Any]:
    """Experts pruned, merged and in fewer bits: print their table and return its numbers."""
    variants, size = {"full": full}, {"full": 4 * parameter_counts(configuration(full[0]).model).total}
    for name in EXPORTS:
        exported = [export(options, name, run) for run in full]
        variants[name], size[name] = [run for run, _ in exported], exported[0][1]
    losses = {name: [evaluate(run)["valid_loss"] for run in runs] for name, runs in variants.items()}
    evaluating = in_turn({name: evaluations(runs[0]) for name, runs in variants.items()})
    generating = in_turn({name: texts(runs[0]) for name, runs in variants.items()})
    rows = []
    for name in variants:
        more = [loss - before for loss, before in zip(losses[name], losses["full"], strict=True)]
        times = [f"{times[name]:.2f}" for times in (evaluating, generating)]
        rows.append([name, f"{size[name] / 2**20:.2f}", spread(losses[name]), spread(more), *times])
    heads = ["model", "MiB of weights", "validation loss", "less the full one's", "time: evaluation", "generation"]
    print(table(heads, rows))
    return {"bytes": size, "losses": losses, "evaluating": evaluating, "generating": generating}


def early(variants: dict[str, list[Trained]]) -> dict[str, Any]:
    """Tokens that leave early: print the table and return its numbers."""
    results: dict[str, Any] = {}
    actions = {}
    for name, runs in variants.items():
        for confidence in (None, *CONFIDENCES):
            leaving = () if confidence is None else (f"eval.exit_confidence={confidence}",)
            key = f"{name}, {'all blocks' if confidence is None else f'sure of {confidence}'}"
            results[key] = [evaluate(run, *leaving) for run in runs]
            actions[key] = evaluations(runs[0], *leaving)
    times = in_turn(actions)
    rows = []
    for key, records in results.items():
        loss, accuracy, depth = ([record.get(f"valid_{k}", 6.0) for record in records] for k in
                                 ("loss", "accuracy", "depth"))  # fmt: skip
        rows.append([key, spread(loss), spread(accuracy), spread(depth, 2), f"{times[key]:.2f}"])
    print(table(["model, when a token leaves", "validation loss", "accuracy", "blocks of 6", "time"], rows))
    return {"records": results, "times": times}


def main() -> None:
    with open_study(arguments(__doc__)) as options:
        full = train(options, "full", *MODEL)
        dropped = train(options, "layer_drop", *MODEL, "model.layer_drop=0.3")
        results = {"smaller": smaller(options, full)}
        print()
        results["early"] = early({"as usual": full, "layer drop": dropped})
        write_json(options, full + dropped, **results)


if __name__ == "__main__":
    main()
