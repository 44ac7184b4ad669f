"""The jobs of a sweep, wherever they run: each leaves what it came to in its folder, and who started them reads it."""

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

JOB_FILE = "job.json"
# submitit, which makes SLURM jobs of a sweep's, would otherwise choose a signal that nothing else here listens to.
SUBMITIT_SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"


class SweepFolder(Callback):
    """Tells the process that starts a sweep where its jobs will be: Hydra alone knows, and calls this."""

    latest: ClassVar[Path | None] = None  # None: no sweep has been started

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folder, without the answers of jobs that may have been there before."""
        SweepFolder.latest = Path(config.hydra.sweep.dir)
        for path in SweepFolder.latest.rglob(JOB_FILE):
            path.unlink()
        os.environ.setdefault(SUBMITIT_SIGNAL, "USR1")


def record_job(folder: Path, number: int, overrides: list[str], value: float | None, error: Exception | None) -> None:
    """Leave the value, or the error, that a job ended with."""
    folder.mkdir(parents=True, exist_ok=True)
    words = None if error is None else str(error)
    known = value if value is not None and math.isfinite(value) else None
    (folder / JOB_FILE).write_text(
        json.dumps({"number": number, "overrides": overrides, "value": known, "error": words})
    )


def print_jobs(folder: Path) -> int:
    """Print a table of jobs, told apart by the overrides that not all of them have; 1 if one failed, else 0."""
    jobs = sorted(
        ((path.parent, json.loads(path.read_text())) for path in folder.rglob(JOB_FILE)),
        key=lambda job: job[1]["number"],
    )
    failed = sum(job["error"] is not None for _, job in jobs)
    common = set.intersection(*(set(job["overrides"]) for _, job in jobs)) if jobs else set()
    print(f"\nsweep: {len(jobs)} jobs, {failed} failed")
    for place, job in jobs:
        name = " ".join(override for override in job["overrides"] if override not in common)
        result = "" if job["value"] is None else f"{job['value']:.4f}  "
        end = f"{result}{place}" if job["error"] is None else f"FAILED: {job['error']}"
        print(f"  {job['number']}  {name}  {end}", flush=True)
    return 1 if failed else 0


def is_started_again() -> bool:
    """Whether SLURM starts this job anew, after a time-out or because it took the nodes away: the run then goes on."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


@contextmanager
def handing_on_stops() -> Iterator[None]:
    """Inside, a run that was stopped and has saved a checkpoint hands the signal on to who listened to it before.

    That is submitit in a job of SLURM, which has the job started again; without it, the process ends.
    """
    try:
        yield
    except SystemExit as stop:
        if stop.code == os.EX_TEMPFAIL and callable(signal.getsignal(signal.SIGUSR1)):
            signal.raise_signal(signal.SIGUSR1)
        raise


def is_lost_job(error: Exception) -> bool:
    """Whether submitit has raised it, because a job has died or was ended without leaving an answer."""
    return type(error).__module__.startswith("submitit.")
