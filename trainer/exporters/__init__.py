"""What `twohop export` can make of a run: a new format is one file here and one line in `EXPORTERS`."""

from collections.abc import Callable
from typing import Any

from twohop.trainer.config import ExportConfig
from twohop.trainer.exporters.hf import export_hf
from twohop.trainer.exporters.smaller import export_pruned, export_quantized
from twohop.trainer.exporters.task import export_task
from twohop.trainer.setup import Run

# Each is called on every rank of the world with the trained model, and returns what rank 0 tells the caller.
EXPORTERS: dict[str, Callable[[Run, ExportConfig], dict[str, Any]]] = {
    "hf": export_hf,
    "pruned": export_pruned,
    "quantized": export_quantized,
    "task": export_task,
}
