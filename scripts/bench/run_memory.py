#!/usr/bin/env python3
"""Memory of small training runs, by part, beside what `twohop plan` says of them.

    torchrun --nproc-per-node 4 scripts/bench/run_memory.py --json build/run_memory.json

Trains a PR-MoE of 13 million parameters for four steps with each engine, over EP sizes, precisions and accumulation,
and takes the peak of a step of each rank: the bytes of all tensors that are alive. The plan gets the loads of that rank
and step. Counted are allocations of torch on the CPU (see `live_tensors`). Left out is what gloo copies inside of its
collectives. Of the steps after the first the one counts in which least was alive. Half an hour; `--engines` one after
the other is quicker than all at once.
"""

import argparse
import gc
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from common import write_json
from live_tensors import recording
from omegaconf import OmegaConf

from twohop.models import init_weights
from twohop.models.experts import ExpertPass, Experts
from twohop.trainer.config import Config, Precision, Recompute
from twohop.trainer.loop import train_step
from twohop.trainer.plan.holding import Holder
from twohop.trainer.plan.memory import Memory, memory_of, precision_of_passes
from twohop.trainer.plan.passes import passes
from twohop.trainer.plan.shape import model_shape
from twohop.trainer.setup import Run, set_up
from twohop.trainer.world import gather_objects, join_world

MIB, STEPS = 2**20, 4
ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2")
PARTS = ("weights", "gradients", "moments", "rest")
MODEL: dict[str, Any] = {
    "name": "measured",
    "vocab_size": 512,
    "max_seq_len": 256,
    "dim": 256,
    "num_layers": 6,
    "num_heads": 8,
    "ffn_dim": 1024,
    "moe": {"experts": [4, 4, 8], "residual": "learned", "router": {"top_k": 2}},
}


class Case(NamedTuple):
    """A run."""

    engine: str  # as `twohop plan` names it
    precision: str
    ep: tuple[int, ...]  # of each MoE layer
    accumulation: int
    micro_batch: int
    seq_len: int
    recompute: str = "none"
    optimizer: str = "adamw"
    source_len: int | None = None  # of an encoder-decoder, whose pairs must all have these lengths


def cases(engines: list[str], precisions: list[str]) -> Iterator[Case]:
    """Little and much memory in activations, without and with accumulation, over EP sizes; then what is special."""
    few, many = (1, 64), (4, 256)
    layouts = ((1, 1, 1), (2, 2, 2), (4, 4, 4), (2, 2, 4))
    for engine, precision, ep in product(engines, precisions, layouts):
        if precision == "bf16_params" and engine != "ddp":
            continue
        yield Case(engine, precision, ep, 1, *many)
        yield Case(engine, precision, ep, 2, *few)
    mixed, precision = layouts[-1], "bf16" if "bf16" in precisions else precisions[0]
    for engine in engines:
        for mode in list(Recompute)[1:]:
            yield Case(engine, precision, mixed, 1, *many, recompute=mode.value)
        if engine in ("ddp", "zero0"):
            yield Case(engine, precision, mixed, 1, *few, optimizer="muon")


def config_of(case: Case, folder: Path, world: int, ranks_per_node: int | None) -> Config:
    """What `twohop train` would get; data are a text in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = {"name": case.engine, "precision": case.precision}
    if case.engine.startswith("zero"):
        engine |= {"name": "deepspeed", "zero_stage": case.engine[-1]}
    settings = {
        "model": MODEL,
        "engine": engine,
        "comm": {"ranks_per_node": ranks_per_node, "ep_size": list(case.ep)},
        "data": data_of(folder),
        "optim": {"name": case.optimizer},
        "train": {
            "steps": STEPS,
            "seq_len": max(case.seq_len, case.source_len or 0),
            "micro_batch": case.micro_batch,
            "global_batch": case.micro_batch * case.accumulation * world,
            "recompute": case.recompute,
        },
    }
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), settings))
    assert isinstance(config, Config)
    return config


def data_of(folder: Path) -> dict[str, Any]:
    """Configuration of a text in `folder`."""
    text = folder / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh \n", k=200_000)))
    return {"source": "text", "files": [str(text)], "cache_dir": str(folder / "cache"), "valid_fraction": 0.1}


def measure(case: Case, config: Config, folder: Path) -> tuple[dict[str, float], list[float]]:
    """Bytes of this rank by part at the peak of a later step, and the rows at the experts of each MoE layer in it.

    Every rank must call this.
    """
    with recording() as live, rows_at_experts() as rows_of:
        run = set_up(config, folder / "run", torch.device("cpu"))
        init_weights(run.model, 0)
        update = run.engine.step
        if case.engine in ("ddp", "zero0", "zero1"):  # the others move them on as they come
            for parameter in run.model.parameters():
                parameter.register_post_accumulate_grad_hook(lambda p: live.name("gradients", [p.grad]))

        def step(lr_factor: float) -> float:
            live.name("gradients", gradients(run))
            return update(lr_factor)

        run.engine.step = step  # type: ignore[method-assign]
        starts: list[int] = []
        rows: list[list[float]] = []  # of each step, of each layer
        for number in range(STEPS):
            starts.append(len(live.named))
            live.name("gradients", [])
            train_step(run, number)
            rows.append([float(np.mean(rows_of.pop(layer.experts))) for _, layer in run.model.moe_layers()])
        starts.append(len(live.named))
        live.name("weights", run.model.parameters())
        live.name("moments", moments(run))
    peaks = [live.peak(since, until) for since, until in pairwise(starts[1:])]  # moments come with the first step
    peak, of_layers = min(zip(peaks, rows[1:], strict=True), key=lambda pair: sum(pair[0].values()))
    return {part: float(peak[part]) for part in PARTS}, of_layers


@contextmanager
def rows_at_experts() -> Iterator[dict[Experts, list[int]]]:
    """How many rows come to them in each pass inside."""
    rows_of: dict[Experts, list[int]] = {}
    compute = ExpertPass.__call__

    def count(self: ExpertPass, rows_RD: torch.Tensor, counts_E: Any) -> torch.Tensor:
        rows_of.setdefault(self.experts, []).append(len(rows_RD))
        return compute(self, rows_RD, counts_E)

    with patch.object(ExpertPass, "__call__", count):
        yield rows_of


def gradients(run: Run) -> list[torch.Tensor]:
    """What the engine holds of gradients before it updates."""
    held = [parameter.grad for parameter in run.model.parameters() if parameter.grad is not None]
    if getattr(run.engine, "stage", None):
        held += [piece for pieces in run.engine.zero.averaged_gradients.values() for piece in pieces]  # type: ignore[attr-defined]
    return held


def moments(run: Run) -> list[torch.Tensor]:
    """The optimizer's state, and master copies of weights."""
    engine: Any = run.engine
    state = [value for values in engine.optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    weights = set(run.model.parameters())
    masters = [weight for weight in engine.weights.values() if weight not in weights]
    return (
        state + masters + (list(engine.zero.single_partition_of_fp32_groups) if getattr(engine, "stage", None) else [])
    )


def planned(case: Case, world: int, rows: list[float]) -> Memory:
    """What `twohop plan` reckons with, for a rank with so many rows at the experts of each layer."""
    precision, recompute = Precision(case.precision), Recompute(case.recompute)
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), {"model": MODEL})).model
    shape = model_shape(model, case.seq_len, case.source_len)
    mean = [case.micro_batch * layer.tokens * layer.top_k for layer in shape.layers]
    loads = [came / usual for came, usual in zip(rows, mean, strict=True)]
    runs_in = precision_of_passes(case.engine, precision)
    ran = passes(model, case.seq_len, case.source_len, runs_in, recompute, loads)
    holder = Holder(shape, case.engine, case.ep, world, precision, case.optimizer)
    return memory_of(holder, ran, case.micro_batch, case.accumulation > 1)


def compared(case: Case, folder: Path, ranks_per_node: int | None = None) -> dict[str, Any]:
    """One case, measured and planned, on the rank whose plan is worst; "error" is planned ÷ measured - 1 of the whole.

    Every rank must call this, and gets the same.
    """
    world, own = dist.get_world_size(), folder / str(dist.get_rank())
    config = config_of(case, own, world, ranks_per_node)
    measured, rows = measure(case, config, own)
    gc.collect()  # an engine and its model know each other
    memory = planned(case, world, rows)
    plan = {part: getattr(memory, part) for part in PARTS[:-1]}
    plan["rest"] = memory.activations + memory.plans + memory.buffers
    if case.engine == "fsdp":  # whose gradients are not all where one can see them
        for values in (plan, measured):
            values["rest"] += values.pop("gradients")
    error = sum(plan.values()) / sum(measured.values()) - 1
    result = {"case": case._asdict(), "rows": rows, "measured": measured, "planned": plan, "error": error}
    return max(gather_objects(result), key=lambda of_rank: abs(of_rank["error"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--precisions", nargs="+", default=[p.value for p in Precision])
    parser.add_argument("--json", type=Path, help="write all cases there")
    options = parser.parse_args()
    join_world(Config().comm)
    leader, results = dist.get_rank() == 0, []
    names = [tempfile.mkdtemp() if leader else ""]
    dist.broadcast_object_list(names)
    for case in cases(options.engines, options.precisions):
        results.append(compared(case, Path(names[0]), ranks_per_node=2))
        if leader:
            print(row(results[-1]), flush=True)
        if leader and options.json is not None:  # what is known so far
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(options.json, {"cases": results})
    if leader:
        print(f"largest error: {max(abs(result['error']) for result in results):.1%} of {len(results)} runs")
    dist.barrier()
    dist.destroy_process_group()


def row(result: dict[str, Any]) -> str:
    """A line of the table: MiB measured / planned."""
    case = Case(**result["case"])
    both = [
        f"{result['measured'][part] / MIB:.1f} / {result['planned'][part] / MIB:.1f}"
        if part in result["planned"]
        else "–"
        for part in PARTS
    ]
    run = [case.engine, case.precision, "/".join(map(str, case.ep)), case.accumulation]
    extra = " ".join(value for value in (case.recompute, case.optimizer) if value not in ("none", "adamw"))
    cells = [*map(str, run), f"{case.micro_batch} × {case.seq_len}", extra, *both, f"{result['error']:+.1%}"]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
