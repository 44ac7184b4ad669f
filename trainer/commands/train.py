"""`twohop train`: compose, validate, decide the run folder, and let the workers train."""

import re
from contextlib import suppress
from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.clusters.nodes import find_nodes
from twohop.trainer.config import Config
from twohop.trainer.errors import ConfigError
from twohop.trainer.initial import check_init, with_origin
from twohop.trainer.launch import joins_outer_launcher, start, world_size
from twohop.trainer.run_folder import has_checkpoint, open_run
from twohop.trainer.sweep import is_started_again
from twohop.trainer.validate import validate

WORKER = "twohop.trainer.workers:train"


def main(args: list[str]) -> int:
    """Train one model, or with --multirun one for each combination; return the exit code."""
    return run_app("train", Config, with_origin(_switched(args)), train)


def _switched(args: list[str]) -> list[str]:
    """The arguments, with `profile=true` as the key that it is short for: Hydra has no value for a group of keys."""
    return [re.sub("^profile=(true|false)$", r"profile.enabled=\1", arg) for arg in args]


def train(config: Config, sweep_dir: Path | None) -> float | None:
    """Train and return `optimized_metric`, on every rank's process or the parent of its node's ranks."""
    nodes = find_nodes(config)
    validate(config, world_size(config.launch, nodes))
    if config.resume is None:
        check_init(config)
    if sweep_dir is not None:
        if config.run.dir is not None:
            raise ConfigError(
                f"run.dir={config.run.dir}: the jobs of a sweep cannot share a folder; set hydra.sweep.dir"
            )
        config.run.dir = str(sweep_dir)
        if is_started_again() and has_checkpoint(sweep_dir):
            config.resume = "auto"
        if config.tracker.name == "wandb" and config.tracker.group is None:
            config.tracker.group = sweep_dir.parent.name
    run_dir = None if joins_outer_launcher() or nodes.count > 1 else open_run(config)
    try:
        return start(WORKER, config, run_dir, nodes).get(config.optimized_metric)
    finally:
        if run_dir is not None:
            with suppress(OSError):  # only an empty folder can be removed: one of a run that never began
                run_dir.rmdir()
