"""A trace of some steps by torch.profiler: profile/rank-N.json.gz in the run folder, for Perfetto (ui.perfetto.dev)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import profile, schedule, supported_activities

from twohop.trainer.errors import ConfigError
from twohop.trainer.setup import Run
from twohop.trainer.world import rank

FOLDER = "profile"


@contextmanager
def profiling(run: Run, first_step: int) -> Iterator[Callable[[], None]]:
    """Around training that begins at `first_step`, on every rank; yields what is to be called after each step.

    Raises:
        ConfigError: training is over before the last step of the trace.
    """
    config, left = run.config.profile, run.config.train.steps - first_step
    if not config.enabled:
        yield lambda: None
        return
    if config.skip + config.steps > left:
        raise ConfigError(
            f"profile.skip={config.skip} and profile.steps={config.steps} are more than the {left} steps of "
            f"train.steps={run.config.train.steps} that are left: lower them, or train longer"
        )
    if rank() != 0 and not config.every_rank:
        yield lambda: None
        return
    path = run.directory / FOLDER / f"rank-{rank()}.json.gz"
    path.parent.mkdir(exist_ok=True)
    with profile(
        activities=supported_activities(),
        schedule=schedule(wait=config.skip - 1, warmup=1, active=config.steps, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step
