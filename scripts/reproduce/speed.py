"""Times of models against each other, in one process and in turn, so that other work on the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from common import Trained, configuration

from twohop.models import generate
from twohop.models.quantize import quantize_experts
from twohop.trainer.checkpoints.checkpoint import load_tensors
from twohop.trainer.config import Config, DistillConfig
from twohop.trainer.evaluate import evaluate
from twohop.trainer.setup import Run, set_up, weights_identity

ROUNDS = 5
ALONE = ("launch.nproc=1", "comm.ranks_per_node=1", "comm.ep_size=null")


def opened(config: Config, folder: Path) -> Run:
    """A run in this process, with the weights of its newest checkpoint."""
    config.distill = DistillConfig()  # speed is that of a model by itself
    run = set_up(config, folder, torch.device("cpu"))
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    load_tensors(checkpoint, run.engine.model_state(), weights_identity(run.config))
    if run.config.eval.expert_bits is not None:
        quantize_experts(run.model, run.config.eval.expert_bits)
    return run


def evaluations(run: Trained, *overrides: str) -> Callable[[], object]:
    """Evaluate that run: 4 batches of 16 sequences."""
    ready = opened(configuration(run, *ALONE, "eval.batches=4", *overrides), run.folder)
    return lambda: evaluate(ready)


def texts(run: Trained, *overrides: str) -> Callable[[], object]:
    """Generate 100 tokens after one."""
    model = opened(configuration(run, *ALONE, *overrides), run.folder).model
    return lambda: generate(model, torch.zeros(1, 1, dtype=torch.int64), 100, temperature=0)


def in_turn(actions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Time of every action ÷ time of the first: medians over rounds, each of which runs all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for round_number in range(ROUNDS + 1):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(t / f for t, f in zip(times, first, strict=True)) for name, times in seconds.items()
    }
