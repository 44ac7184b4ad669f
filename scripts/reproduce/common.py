"""What the scripts here share: a training for each variant and seed, evaluations of it, means with spread, tables.

A script is one command that shows one effect: its docstring says which and whose, it prints the table that stands in
docs/results.md, and with `--json` writes every number behind it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf

from twohop.models import parameter_counts
from twohop.trainer.app import to_config
from twohop.trainer.config import Config
from twohop.trainer.launching import workers
from twohop.trainer.run_folder import read_config
from twohop.trainer.validate.groups import validate

# A language model of bytes that trains in less than a minute on one core: what the studies on text share.
SMALL_LM = (
    "model=dense", "model.dim=64", "model.num_layers=4", "model.ffn_dim=128", "model.vocab_size=257",
    "model.moe.every=1", "data=stdlib", "train.steps=200", "train.seq_len=128", "train.global_batch=16",
    "train.micro_batch=4", "optim.lr=5e-3", "eval.every=0", "eval.batches=16", "checkpoint.every=0",
    "generate.max_new_tokens=1",
)  # fmt: skip
Variants = dict[str, list["Trained"]]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    name: str  # of its variant
    seed: int
    folder: Path
    summary: dict[str, Any]  # summary.json


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every script takes; one may add its own before `open_study` reads them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="train with seed=0 … SEEDS-1")
    parser.add_argument("--runs", type=Path, help="keep the run folders there; a finished one is not trained again")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("overrides", nargs="*", help="for all runs, e.g. train.steps=20")
    return parser


@contextmanager
def open_study(parser: argparse.ArgumentParser) -> Iterator[argparse.Namespace]:
    """The options of the command line, with a folder for the runs that is deleted at the end unless it was named."""
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        options.runs = options.runs or Path(temporary)
        yield options


def train(options: argparse.Namespace, name: str, *overrides: str) -> list[Trained]:
    """The variant `name`: `twohop train` with these overrides, once for each seed. Progress goes to stderr."""
    return [_train_once(options, name, seed, [*overrides, *options.overrides]) for seed in range(options.seeds)]


def _train_once(options: argparse.Namespace, name: str, seed: int, overrides: list[str]) -> Trained:
    folder = options.runs / name / f"seed-{seed}"
    summary, given = folder / "summary.json", folder / "overrides.json"
    if given.exists() and json.loads(given.read_text()) != overrides:
        sys.exit(f"--runs {options.runs}: {folder} was trained with other overrides; name another folder")
    if not summary.exists():
        print(f"--- {name}, seed {seed}", file=sys.stderr, flush=True)
        command = ["twohop", "train", *overrides, f"seed={seed}", f"run.dir={folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        given.write_text(json.dumps(overrides))
    return Trained(name, seed, folder, json.loads(summary.read_text()))


def evaluate(run: Trained, *overrides: str) -> dict[str, Any]:
    """What `twohop evaluate run=…` returns with these overrides; in this process, which saves a start each time."""
    config = configuration(run, "launch.nproc=1", "comm.ranks_per_node=1", "comm.ep_size=null", *overrides)
    validate(config, world_size=1, training=False)
    with redirect_stdout(sys.stderr):
        return workers.evaluate(config, run.folder)


def configuration(run: Trained, *overrides: str) -> Config:
    """What a run was trained with, and overrides on top."""
    changed = OmegaConf.from_dotlist(list(overrides))
    config = to_config(OmegaConf.merge(OmegaConf.structured(Config), read_config(run.folder), changed), Config)
    assert isinstance(config, Config)
    return config


def values(runs: Sequence[Trained], key: str) -> list[float]:
    """One number of the summary of every run."""
    return [run.summary[key] for run in runs]


def spread(numbers: Sequence[float], digits: int = 4) -> str:
    """`mean ± sample standard deviation`, over seeds."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def loss_table(variants: Variants, **columns: Sequence[str]) -> str:
    """A row for each variant: its parameters and those a token uses, its validation loss, and that of the first less.

    The difference is taken seed by seed: runs of one seed see the same batches. `columns` come last, by their heads.
    """
    baseline = values(next(iter(variants.values())), "valid_loss")
    rows = []
    for place, (name, runs) in enumerate(variants.items()):
        losses = values(runs, "valid_loss")
        less = [loss - reference for loss, reference in zip(losses, baseline, strict=True)]
        sizes = [f"{count / 1e6:.2f} M" for count in parameter_counts(configuration(runs[0]).model)]
        more = [column[place] for column in columns.values()]
        rows.append([name, *sizes, spread(losses), spread(less) if place else "", *more])
    heads = ["variant", "parameters", "used by a token", "validation loss", "less the first's", *columns]
    return table(heads, rows)


def compare(
    doc: str | None,
    variants: Mapping[str, tuple[str, ...]],
    more: Callable[[Variants], dict[str, list[str]]] | None = None,
) -> None:
    """A whole script: train a `SMALL_LM` with the overrides of each variant, print their `loss_table`, write --json.

    `more` makes further columns of the trained variants.
    """
    with open_study(arguments(doc)) as options:
        trained = {name: train(options, name, *SMALL_LM, *overrides) for name, overrides in variants.items()}
        columns = more(trained) if more else {}
        print(loss_table(trained, **columns))
        write_json(options, [run for runs in trained.values() for run in runs], columns=columns)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write_json(options: argparse.Namespace, runs: Sequence[Trained], **results: Any) -> None:
    """Summaries of all runs, results and what the numbers depend on, to the file of `--json` if there is one."""
    if options.json is None:
        return
    machine = {"cpu_count": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
    summaries = [asdict(run) | {"folder": str(run.folder)} for run in runs]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"machine": machine, **results, "runs": summaries}, indent=1) + "\n")
