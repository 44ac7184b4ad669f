"""When training saves its checkpoints: at once, or in the background while the next steps go on."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from twohop.trainer.setup import Run
from twohop.trainer.world import max_over_world, world_size


class Saver:
    """Saves the checkpoints of one training, one at a time. Every rank must make one, and call its methods together.

    With checkpoint.asynchronous, training waits for a copy of the state in host memory; a thread writes the copy. What
    the threads of all ranks tell each other goes through a gloo group of their own, beside the training's messages.
    """

    def __init__(self, run: Run, tracker_id: str) -> None:
        self._run = run
        self._tracker_id = tracker_id
        self._pending: Future[Any] | None = None
        self._group = None
        if run.config.checkpoint.asynchronous:
            on_gpu = run.device.type == "cuda"
            # Keeps its memory: a save starts only when the one before has been written.
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_non_blocking_copy=on_gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                )
            )
            if world_size() > 1:
                # Writing may take longer than any step: the long patience, not that of training.
                patience = timedelta(seconds=run.config.comm.init_timeout_s)
                self._group = dist.new_group(backend="gloo", timeout=patience)

    def save(self, step: int) -> None:
        """Save the state after `step` steps, or begin to, once an earlier save has ended.

        Raises:
            CheckpointError: this save or the earlier one failed.
        """
        self.finish()
        run = self._run
        state = run.state()
        if not run.config.checkpoint.asynchronous:
            run.checkpoints.save(step, state, run.identity(), self._tracker_id)
            return
        copy = cast(dict[str, Tensor], self._stager.stage(state))
        self._pending = _in_background(
            lambda: run.checkpoints.save(step, copy, run.identity(), self._tracker_id, self._group)
        )

    def check(self) -> None:
        """Raise what ended a save in the background on any rank; do not wait for one that is still being written."""
        if not self._run.config.checkpoint.asynchronous:
            return
        pending = self._pending
        failed = pending is not None and pending.done() and pending.exception() is not None
        somewhere = torch.tensor(int(failed), device=self._run.device)
        max_over_world(somewhere, "outcome of the save")
        if somewhere:
            self.finish()

    def finish(self) -> None:
        """Wait until nothing is being written, for as long as comm.init_timeout_s allows the ranks to wait."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _in_background(action: Callable[[], Any]) -> Future[Any]:
    """The result of `action` in a thread that does not keep a process which failed meanwhile from ending."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
