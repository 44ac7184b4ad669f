"""Weights & Biases: offline by default, without a key; `wandb sync RUN_DIR/wandb/offline-run-*` uploads later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import wandb

from twohop.trainer.config import TrackerConfig
from twohop.trainer.errors import ConfigError

MODES = ("offline", "online", "disabled")


def start(config: TrackerConfig, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> "WandbTracker":
    """Open the run `run_id`, or continue it; see `build_trackers`."""
    if config.mode not in MODES:
        raise ConfigError(f"tracker.mode={config.mode}: use one of {', '.join(MODES)}")
    try:
        if config.mode == "online" and not wandb.login(prompt=False):
            raise ConfigError(
                "tracker.mode=online: no W&B API key on this machine; run `wandb login`, set WANDB_API_KEY, "
                "or use tracker.mode=offline"
            )
        run = wandb.init(
            id=run_id,
            resume="allow",
            project=config.project,
            group=config.group,
            name=Path(run_dir).name,
            dir=run_dir,
            config=dict(run_config),
            mode=cast(Any, config.mode),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
    except wandb.Error as error:
        raise ConfigError(f"tracker=wandb tracker.mode={config.mode}: {error}; or use tracker=none") from None
    return WandbTracker(run)


class WandbTracker:
    """A `Tracker` over one W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`. W&B drops a step below its last one, so steps taken again after a resume count once."""
        self._run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._run.summary.update(summary)
        self._run.finish()
