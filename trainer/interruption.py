"""Stop signals: a rank that gets one finishes its step; then the whole world saves a checkpoint and ends together.

SIGTERM is what torchrun, SLURM and Kubernetes send some time before they kill; SIGUSR1 is what SLURM sends earlier
still, on request (`--signal=USR1@120`).
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from twohop.trainer.world import max_over_world

STOP_AND_SAVE = (signal.SIGTERM, signal.SIGUSR1)
# A launcher passes on what the batch system may have sent to every process of the job already: signals so close
# together are one.
SAME_S = 2.0


class StopSignal:
    """The stop signal that this rank has got, if any."""

    def __init__(self) -> None:
        self.number = 0  # none

    def agreed(self, device: torch.device) -> signal.Signals | None:
        """The signal that some rank has got, the same on all; None if none has. Every rank must call this."""
        number = torch.tensor(self.number, device=device)
        max_over_world(number, "agreement to stop")
        return signal.Signals(int(number)) if number else None


@contextmanager
def noting_stop_signals() -> Iterator[StopSignal]:
    """Inside, a signal of `STOP_AND_SAVE` is only noted; another one, `SAME_S` later, ends the process at once.

    Only the main thread may enter. Signals are seen by a thread, which Python wakes from within the handler: the main
    thread may be waiting inside a library for ranks that never answer, which is why somebody signals again.
    """
    noted = StopSignal()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_watch, args=(read_end, noted), daemon=True).start()
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_AND_SAVE}
    for number in STOP_AND_SAVE:
        signal.siginterrupt(number, False)  # libraries need not be ready for system calls that fail with EINTR
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write_end)


def _watch(read_end: int, noted: StopSignal) -> None:
    """Read the number of each signal as it comes, until the other end is closed."""
    first = 0.0
    while received := os.read(read_end, 1):
        number = received[0]
        if number not in STOP_AND_SAVE:
            continue
        if noted.number == 0:
            noted.number, first = number, time.monotonic()
        elif time.monotonic() - first > SAME_S:
            os._exit(128 + number)
    os.close(read_end)
