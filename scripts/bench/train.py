#!/usr/bin/env python3
"""Training end to end: `twohop train` against transformers in a plain loop and DeepSpeed's engine with its MoE layer.

    scripts/bench/train.py                                  # the size of the quickstart, as a Mixtral
    scripts/bench/train.py --case quickstart                # the quickstart itself, a PR-MoE
    scripts/bench/train.py --case moe_100m --json build/train_100m.json
    scripts/bench/train.py train.seq_len=128                # further overrides of `twohop train`

All sides begin with the same weights and train on the same batches with the same optimizer, allocator and number of
threads in all; the losses of the first steps are compared before anything is timed. Each runs in processes of its own,
in turn, `--rounds` times. Ours is the worker of `twohop train`, whole. The floor: the dense matmuls of the step alone.
A peer that is not installed is named as skipped, and so is one that has no class for the model.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import machine, write_json
from train_sides import OPTIONS

from twohop.models.interop import InteropError, fit_family
from twohop.trainer.app import run_app
from twohop.trainer.commands.train import for_hydra
from twohop.trainer.config import Config
from twohop.trainer.launching.launch import start
from twohop.trainer.monitoring.metrics import read_metrics
from twohop.trainer.validate.groups import validate

NO_ROUTER_LOSSES = ("model.moe.router.load_balance_loss=0", "model.moe.router.z_loss=0")
CASES: dict[str, tuple[str, ...]] = {
    "quickstart": ("experiment=quickstart",),
    "mixtral": ("model=moe_topk", "model.moe.every=1", *NO_ROUTER_LOSSES),
    "moe_100m": (
        *("model=moe_100m", *NO_ROUTER_LOSSES),
        *("data.tokenizer.kind=bpe", "data.max_mib=4"),
        *("train.seq_len=128", "train.global_batch=16", "train.micro_batch=4", "optim.lr=1e-3"),
    ),
}
# Relative, of the first losses. They agree to the rounding of fp32 before the first update; the first updates of AdamW
# divide gradients by their own size, and so pass on the noise of those that are nearly 0.
TOLERANCES = (1e-5, 1e-3, 1e-3)
# At a capacity, DeepSpeed drops as many tokens as we do, but others: not those that come last.
DROPS = (1e-3, 1e-3, 1e-3)
# Nothing beside the steps. DeepSpeed clips by a norm that is wrong for experts (its issue 8475): so all compute the
# norm, and none is above the limit.
COMMON = ("eval.every=0", "eval.batches=1", "generate.max_new_tokens=1", "checkpoint.every=0", "optim.clip_norm=1000")


@dataclass
class Side:
    """One of those that are compared."""

    name: str
    kind: str  # of SIDES in train_sides.py
    processes: int
    threads: int  # of each process
    needs: str | None = None  # a package
    options: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    step_s: list[float] = field(default_factory=list)
    memory: int = 0  # bytes resident, of rank 0

    @property
    def layout(self) -> tuple[int, int]:
        return self.processes, self.threads


def sides() -> list[Side]:
    everywhere = ("comm.ep_size=1",)  # all experts on every rank: only gradients travel
    return [
        Side("ours, 1 process", "ours", 1, 2),
        Side("ours, data parallel", "ours", 2, 1, overrides=everywhere),
        Side("ours, expert parallel", "ours", 4, 1),
        Side("transformers, eager", "transformers", 1, 2, "transformers", {"experts": "eager"}),
        Side("transformers, grouped_mm", "transformers", 1, 2, "transformers", {"experts": "grouped_mm"}),
        Side("DeepSpeed, data parallel", "deepspeed", 2, 1, "deepspeed", overrides=everywhere),
        Side("DeepSpeed, expert parallel", "deepspeed", 4, 1, "deepspeed"),
    ]


def main() -> None:
    args = parse_arguments()
    for result in compare(args):
        print(as_markdown(result), flush=True)
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, result)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="mixtral", help="the model and its batches (default: mixtral)")
    parser.add_argument("--steps", type=int, default=10, help="steps of each turn (default: 10)")
    parser.add_argument("--skip", type=int, default=3, help="first steps of a turn that are not timed (default: 3)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: 2)")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="sides whose names contain this; may be given again"
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured there")
    parser.add_argument("overrides", nargs="*", help="further overrides of `twohop train`, such as train.seq_len=128")
    args = parser.parse_args()
    if args.steps <= args.skip or args.skip < len(TOLERANCES):
        parser.error(f"--skip must be at least {len(TOLERANCES)}, whose losses are compared, and --steps larger")
    return args


# -- measuring -------------------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give every side its turns; after each round, what is known so far."""
    overrides = [*CASES[args.case], *COMMON, f"train.steps={args.steps}", *args.overrides]
    contenders, skipped = [side for side in sides() if any(text in side.name for text in args.only or [""])], {}
    configs = {side.name: compose([*overrides, *side.overrides], *side.layout) for side in contenders}
    for side in contenders:
        if reason := why_not(side, configs[side.name]):
            skipped[side.name] = reason
            tell(f"skipped: {side.name}: {reason}")
    contenders = [side for side in contenders if side.name not in skipped]
    train = configs[contenders[0].name].train
    expected: list[float] = []
    kept = 1.0
    floors: dict[tuple[int, int], list[float]] = {side.layout: [] for side in contenders}
    phases: dict[str, dict[str, float]] = {}
    for number in range(args.rounds):
        for side in contenders:
            with tempfile.TemporaryDirectory(prefix="twohop-bench-") as folder:
                told = side.options | {"expected": expected, "tolerances": tolerances(side, configs[side.name])}
                result = turn(side.kind, configs[side.name], Path(folder), told)
                if side.kind == "ours":
                    records = [r for r in read_metrics(Path(folder)) if r["kind"] == "train"][args.skip :]
                    kept, phases[side.name] = assignments_kept(records), mean_phases(records)
            expected = expected or result["losses"][: len(TOLERANCES)]
            ends = result["ends"][args.skip - 1 :]
            side.step_s += [after - before for before, after in pairwise(ends)]
            side.memory = max(side.memory, result["memory"])
            tell(f"{side.name}: {statistics.median(side.step_s):.3f} s a step")
        for layout, seconds in floors.items():
            with tempfile.TemporaryDirectory(prefix="twohop-bench-") as folder:
                told = {"kept": kept, "repeats": args.steps - args.skip}
                seconds += turn("floor", compose(overrides, *layout), Path(folder), told)["seconds"]
        yield {
            "case": args.case,
            "overrides": overrides,
            "machine": machine(),
            "rounds": number + 1,
            "timed_steps": args.steps - args.skip,
            "first_losses": expected,
            "kept": kept,
            "tokens": train.global_batch * train.seq_len,
            "floor_s": {in_words(layout): statistics.median(seconds) for layout, seconds in floors.items()},
            "sides": {
                side.name: {
                    "layout": in_words(side.layout),
                    "step_s": statistics.median(side.step_s),
                    "all_step_s": side.step_s,
                    "memory": side.memory,
                }
                for side in contenders
            },
            "phases": phases,
            "skipped": skipped,
        }


def compose(overrides: Sequence[str], processes: int, threads: int) -> Config:
    """The configuration of `twohop train` with these overrides, for this many processes on one node or two."""
    configs: list[Config] = []
    layout = [f"launch.nproc={processes}", f"launch.omp_threads={threads}"]
    layout += ["comm.ranks_per_node=null"] if processes < 4 else []

    def take(config: Config, _: Path | None) -> None:
        configs.append(config)

    run_app("train", Config, for_hydra([*overrides, *layout]), take)
    validate(configs[0], processes)
    return configs[0]


def why_not(side: Side, config: Config) -> str | None:
    """Why a side cannot take part."""
    if side.needs is not None and importlib.util.find_spec(side.needs) is None:
        return f"{side.needs} is not installed"
    if side.kind == "transformers":
        try:
            fit_family(config.model)
        except InteropError as error:
            return str(error)
    return None


def tolerances(side: Side, config: Config) -> tuple[float, ...]:
    """How far the first losses may be from ours."""
    return DROPS if side.kind == "deepspeed" and config.model.moe.drops_in_training else TOLERANCES


def turn(kind: str, config: Config, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One turn of a side in fresh processes."""
    (folder / OPTIONS).write_text(json.dumps({"side": kind, **options}))
    return start("train_sides:run", deepcopy(config), folder)


def assignments_kept(records: list[dict[str, Any]]) -> float:
    """The part of a token's experts that had room for it, over all layers."""
    return 1 - statistics.mean(layer["dropped"] for record in records for layer in record["moe"].values())


def mean_phases(records: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each phase in a step, by the clock of the run."""
    names = dict.fromkeys(name for record in records for name in record["phase_s"])
    return {name: statistics.mean(record["phase_s"].get(name, 0.0) for record in records) for name in names}


# -- telling ---------------------------------------------------------------------------------------------------------


def in_words(layout: tuple[int, int]) -> str:
    return f"{layout[0]} × {layout[1]}"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_markdown(result: dict[str, Any]) -> str:
    """A row for each side: the share of the floor is that of its own layout; ÷ the best peer of all layouts."""
    tokens, rows = result["tokens"], result["sides"]
    peers = [row["step_s"] for name, row in rows.items() if not name.startswith("ours")]
    lines = [
        "| | processes × threads | s a step | tokens/s | ÷ best peer | share of the floor | MB, one process |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        against = f"{min(peers) / row['step_s']:.2f}" if peers else "-"
        share = result["floor_s"][row["layout"]] / row["step_s"]
        lines.append(
            f"| {name} | {row['layout']} | {row['step_s']:.3f} | {tokens / row['step_s']:,.0f} | {against} | "
            f"{share:.2f} | {row['memory'] / 1e6:,.0f} |"
        )
    for layout, seconds in result["floor_s"].items():
        lines.append(f"| the matmuls alone | {layout} | {seconds:.3f} | {tokens / seconds:,.0f} | | 1 | |")
    for name, phases in result["phases"].items():
        whole = sum(phases.values())
        parts = ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in phases.items())
        lines.append(f"\n{name}: {parts}")
    lines += [f"\nskipped: {name}: {reason}" for name, reason in result["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
