"""The micro-batches of each step for one rank, made when they are asked for, or ahead in a thread."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch

from twohop.trainer.config import Config
from twohop.trainer.data.build import Data
from twohop.trainer.data.order import step_numbers
from twohop.trainer.data.samples import Batch


class MicroBatch(NamedTuple):
    """What a forward pass takes at once."""

    number: int  # of all micro-batches of the training
    targets: int  # that count
    load: Callable[[], Batch]  # the samples, on the host


class Step(NamedTuple):
    """The data of a step."""

    targets: int  # of the global batch
    micro_batches: list[MicroBatch]  # of this rank


class Loader:
    """The training data of rank `rank` of `world_size`: it takes the micro-batches rank, rank + world_size, ….

    `data.prefetch` steps are made ahead, in a thread and in order; the batches are the same for any number. On a GPU
    they are also pinned, so that they are copied while it works. An error is raised by the step that it belongs to.
    """

    def __init__(self, config: Config, data: Data, device: torch.device, rank: int, world_size: int) -> None:
        self._config, self._data, self._device = config, data, device
        self._first, self._stride = rank, world_size
        on_gpu = device.type == "cuda"
        # On the CPU the thread would take its time from the training that it is to serve.
        self._ahead = config.data.prefetch if config.data.prefetch is not None else int(on_gpu)
        self._pins = on_gpu
        self._thread: ThreadPoolExecutor | None = None
        self._made: deque[Future[Step]] = deque()  # of the steps from `_next` on
        self._next = -1

    def step(self, step: int) -> Step:
        """The data of `step`, counted from 0. Steps are made ahead if they are asked for in order.

        Raises:
            DataError: of the data.
        """
        if not self._ahead:
            return self._plan(step)
        if step != self._next:
            self.close()
            self._thread, self._next = ThreadPoolExecutor(1, "twohop-data"), step
        assert self._thread is not None
        while len(self._made) <= self._ahead and self._next + len(self._made) < max(self._config.train.steps, step + 1):
            self._made.append(self._thread.submit(self._make, self._next + len(self._made)))
        self._next += 1
        return self._made.popleft().result()

    def close(self) -> None:
        """End the thread, and forget what it has made."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._next = None, -1
        self._made.clear()

    def _plan(self, step: int) -> Step:
        """The data of a step, each micro-batch to be loaded when it is needed."""
        train, samples = self._config.train, self._data.train
        order, seed = self._config.data.order, self._config.seed
        numbers = step_numbers(order, seed, step, train.global_batch, len(samples), self._data.mixture)
        count, micro_batches = train.global_batch // train.micro_batch, []
        for index in range(self._first, count, self._stride):
            own = numbers[index * train.micro_batch : (index + 1) * train.micro_batch]
            targets = samples.num_targets(own)
            micro_batches.append(MicroBatch(step * count + index, targets, partial(samples.batch, own)))
        return Step(samples.num_targets(numbers), micro_batches)

    def _make(self, step: int) -> Step:
        """The data of a step, loaded."""
        plan = self._plan(step)
        return plan._replace(micro_batches=[self._loaded(micro) for micro in plan.micro_batches])

    def _loaded(self, micro: MicroBatch) -> MicroBatch:
        batch = micro.load().pinned() if self._pins else micro.load()
        return micro._replace(load=lambda: batch)
