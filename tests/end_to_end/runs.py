"""What the end-to-end tests run on every rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tests.tiny import tiny_config
from twohop.comm import CommError
from twohop.models import init_weights
from twohop.trainer import loop
from twohop.trainer.data import loader
from twohop.trainer.launching.workers import train
from twohop.trainer.loop import train_step
from twohop.trainer.monitoring.progress import Progress
from twohop.trainer.setup import Run, set_up
from twohop.trainer.world import join_world, rank

Curve = list[tuple[float, float]]  # (loss, gradient norm) of each step


def start(directory: Path, *overrides: str) -> Run:
    """A fresh tiny run, ready for its first step."""
    config = tiny_config(directory, *overrides)
    run = set_up(config, directory / "run", join_world(config.comm))
    init_weights(run.model, config.seed)
    return run


def curve(directory: Path, overrides: Sequence[str]) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Loss and gradient norm of every step, and the weights that this rank ends with (its shards of experts)."""
    run = start(directory, *overrides)
    records = [train_step(run, step) for step in range(run.config.train.steps)]
    weights = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    return [(record["loss"], record["grad_norm"]) for record in records], weights


def whole_curve(directory: Path, overrides: Sequence[str]) -> tuple[Curve, dict[str, torch.Tensor]]:
    """The same, with the weights of the whole model."""
    run = start(directory, *overrides)
    records = [train_step(run, step) for step in range(run.config.train.steps)]
    weights = {name: whole(tensor).clone() for name, tensor in run.engine.model_state().items()}
    return [(record["loss"], record["grad_norm"]) for record in records], weights


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that may be spread over ranks, all of it. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def records(directory: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """What metrics.jsonl says of every step."""
    run = start(directory, *overrides)
    return [train_step(run, step) for step in range(run.config.train.steps)]


def train_run(directory: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A whole training as the command does it, in `run.dir`."""
    config = tiny_config(directory, *overrides)
    return train(config, None)


def train_with_bad_data_on_rank_1(directory: Path) -> str:
    """What each rank says when rank 1 cannot read its second batch."""
    run = start(directory, "comm.ep_size=2", "comm.timeout_s=20")
    read = loader.step_numbers

    def fail_on_rank_1(*args: Any) -> list[int]:
        if rank() == 1:
            raise OSError("the disk is gone")
        return read(*args)

    loop.train_step(run, 0)
    loader.step_numbers = fail_on_rank_1
    try:
        loop.train(run, 1, "", None, Progress(run.config.train.steps, False))
    except (CommError, OSError) as error:
        return str(error)
    finally:
        loader.step_numbers = read
    return ""
