"""`twohop train`: compose, validate, decide the run folder, and let the workers train."""

import re
from contextlib import suppress
from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.clusters.nodes import Nodes, find_nodes
from twohop.trainer.config import ClusterKind, Config
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching.launch import joins_outer_launcher, preloading, start, world_size
from twohop.trainer.run_folder import has_checkpoint, open_run
from twohop.trainer.sweep import is_started_again

WORKER = "twohop.trainer.launching.workers:train"


def main(args: list[str]) -> int:
    """Train one model, or with --multirun one for each combination; return the exit code."""
    return run_app("train", Config, for_hydra(args), train)


def for_hydra(args: list[str]) -> list[str]:
    """The arguments of a run with what they stand for.

    `profile=true` is short for a key, because Hydra has no value for a group of keys; `with_origin` adds the model.
    """
    if any(arg.lstrip("+").startswith("init.") for arg in args):
        from twohop.trainer.initial import with_origin  # needs torch, which `--help` does not

        args = with_origin(args)
    return [re.sub("^profile=(true|false)$", r"profile.enabled=\1", arg) for arg in args]


def train(config: Config, sweep_dir: Path | None) -> float | None:
    """Train and return `optimized_metric`, on every rank's process or the parent of its node's ranks."""
    nodes = find_nodes(config)
    with preloading(WORKER, config.launch):
        return _train(config, sweep_dir, nodes)


def _train(config: Config, sweep_dir: Path | None, nodes: Nodes) -> float | None:
    from twohop.trainer.initial import check_init
    from twohop.trainer.validate.groups import validate

    validate(config, world_size(config.launch, nodes))
    if config.resume is None:
        check_init(config)
    if sweep_dir is not None:
        _join_sweep(config, sweep_dir, nodes)
    run_dir = None if joins_outer_launcher() or nodes.count > 1 else open_run(config)
    try:
        return start(WORKER, config, run_dir, nodes).get(config.optimized_metric)
    finally:
        if run_dir is not None:
            with suppress(OSError):  # only an empty folder can be removed: one of a run that never began
                run_dir.rmdir()


def _join_sweep(config: Config, sweep_dir: Path, nodes: Nodes) -> None:
    """Make the run one of a sweep's: it lives in the folder of its job, and goes on there when the job does."""
    if config.run.dir is not None:
        raise ConfigError(f"run.dir={config.run.dir}: the jobs of a sweep cannot share a folder; set hydra.sweep.dir")
    if nodes.count > 1 and config.cluster.name is not ClusterKind.slurm:
        raise ConfigError(
            f"--multirun on {nodes.count} nodes would make each of them its own sweep: add cluster=slurm, which makes "
            "each combination a job, or sweep on one node"
        )
    config.run.dir = str(sweep_dir)
    if is_started_again() and has_checkpoint(sweep_dir):
        config.resume = "auto"
    if config.tracker.name == "wandb" and config.tracker.group is None:
        config.tracker.group = sweep_dir.parent.name
