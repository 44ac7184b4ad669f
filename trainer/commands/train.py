"""`twohop train`: compose, validate, decide the run folder, and let the workers train."""

from contextlib import suppress
from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.config import Config
from twohop.trainer.errors import ConfigError
from twohop.trainer.initial import check_init, with_origin
from twohop.trainer.launch import joins_outer_launcher, start, world_size
from twohop.trainer.run_folder import open_run
from twohop.trainer.validate import validate

WORKER = "twohop.trainer.workers:train"


def main(args: list[str]) -> int:
    """Train one model, or with --multirun one for each combination; return the exit code."""
    return run_app("train", Config, with_origin(args), train)


def train(config: Config, sweep_dir: Path | None) -> float | None:
    """Train and return the final validation loss, on rank 0's process or the parent of all ranks."""
    validate(config, world_size(config.launch))
    if config.resume is None:
        check_init(config)
    if sweep_dir is not None:
        if config.run.dir is not None:
            raise ConfigError(
                f"run.dir={config.run.dir}: the jobs of a sweep cannot share a folder; set hydra.sweep.dir"
            )
        config.run.dir = str(sweep_dir)
    run_dir = None if joins_outer_launcher() else open_run(config)
    try:
        return start(WORKER, config, run_dir).get("valid_loss")
    finally:
        if run_dir is not None:
            with suppress(OSError):  # only an empty folder can be removed: one of a run that never began
                run_dir.rmdir()
