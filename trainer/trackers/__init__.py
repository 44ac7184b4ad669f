"""Experiment trackers, found by name; each lives in a module of this package and is imported when chosen."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from twohop.trainer.config import TrackerConfig
from twohop.trainer.errors import ConfigError

# name → module with `start(config, run_dir, run_id, run_config) -> Tracker`; None: nothing beside metrics.jsonl
TRACKERS: dict[str, str | None] = {"none": None, "wandb": f"{__name__}.wandb", "tensorboard": f"{__name__}.tensorboard"}


class Tracker(Protocol):
    """Receives what metrics.jsonl receives, as flat numbers. Lives in one process (rank 0)."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record `values` at our own step, which never decreases within a process."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Show the summary and flush everything to disk."""


def build_trackers(config: TrackerConfig, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> list[Tracker]:
    """Start the tracker that `config` names: a list of none or one.

    Args:
        config: name and settings.
        run_dir: every file of the tracker is written below it.
        run_id: the same id again continues the same run.
        run_config: the resolved configuration as plain values, to be shown beside the run.

    Raises:
        ConfigError: an unknown name, or the tracker cannot start.
    """
    if config.name not in TRACKERS:
        raise ConfigError(f"tracker.name={config.name}: unknown; use one of {', '.join(TRACKERS)}")
    module = TRACKERS[config.name]
    return [] if module is None else [import_module(module).start(config, run_dir, run_id, run_config)]
