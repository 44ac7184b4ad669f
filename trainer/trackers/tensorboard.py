"""TensorBoard: curves in files below tensorboard/ in the run folder; `tensorboard --logdir RUNS` shows them."""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from twohop.trainer.config import TrackerConfig

FOLDER = "tensorboard"


def start(config: TrackerConfig, run_dir: Path, run_id: str, run_config: Mapping[str, Any]) -> "TensorBoardTracker":
    """See `build_trackers`. A folder is one run to TensorBoard, so a resumed one goes on in its own."""
    return TensorBoardTracker(Path(run_dir) / FOLDER, run_config)


class TensorBoardTracker:
    """A `Tracker` over one folder of event files."""

    def __init__(self, folder: Path, run_config: Mapping[str, Any]) -> None:
        self._folder, self._run_config = folder, run_config
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`. TensorBoard drops what a killed run had logged from the first step on that is logged here."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text("config", _as_code(self._run_config), step)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """See `Tracker`."""
        if self._writer is not None:
            self._writer.add_text("summary", _as_code(summary))
            self._writer.close()


def _as_code(values: Mapping[str, Any]) -> str:
    """A block that TensorBoard's Markdown leaves as it is."""
    return textwrap.indent(json.dumps(values, indent=2), "    ")
