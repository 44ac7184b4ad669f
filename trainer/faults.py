"""What each rank was doing when training failed: faults/rank-N.txt in the run folder, and torch's flight recorder.

A rank that fails says which phase it was in, with its stacks; so does, while it hangs, one that stays in a step for
longer than comm.timeout_s, which is when the others give up waiting for it. The flight recorder lists the last
collectives: on the CPU they are written beside, as rank-N.json; on CUDA, NCCL's watchdog writes nccl-N, which
`torchfrtrace` reads.
"""

import faulthandler
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import torch

from twohop.comm import PhaseClock
from twohop.comm.clock import raised_in
from twohop.trainer.errors import Interrupted, UserError
from twohop.trainer.setup import Run
from twohop.trainer.world import rank, world_size

FAULTS = "faults"


@contextmanager
def recording_faults(run: Run) -> Iterator[None]:
    """Around training, on every rank. Bad input and an orderly stop are no faults."""
    directory = run.directory / FAULTS
    if run.device.type == "cuda":
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(directory / "nccl-"))
        directory.mkdir(exist_ok=True)  # NCCL's watchdog makes none
    over = threading.Event()
    watcher = threading.Thread(
        target=_watch, args=(run.clock, run.config.comm.timeout_s, directory, over), daemon=True, name="fault watcher"
    )
    watcher.start()
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide the reason
            _write(directory, raised_in(error) or "outside any phase", "".join(traceback.format_exception(error)))
        raise
    finally:
        over.set()
        watcher.join()
        with suppress(OSError):  # only an empty folder can be removed
            directory.rmdir()


def _watch(clock: PhaseClock, patience_s: float, directory: Path, over: threading.Event) -> None:
    """Write down where this rank is when it has been in one step for `patience_s`, once for each step."""
    reported = None
    while not over.wait(min(1.0, patience_s / 4)):
        step, seconds = clock.running_for()
        if seconds > patience_s and step != reported:
            reported = step
            _write(directory, clock.where(), f"It has been in this step for more than {patience_s:g} s.\n")


def _write(directory: Path, where: str, what: str) -> None:
    directory.mkdir(exist_ok=True)
    with (directory / f"rank-{rank()}.txt").open("a") as file:
        file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S}, rank {rank()} of {world_size()}\n{where}\n\n{what}\n")
        file.flush()  # faulthandler writes past the buffer
        faulthandler.dump_traceback(file)
        file.write("\n")
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        # The public name for this is the NCCL watchdog's dump; gloo's records have none.
        dump = torch._C._distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]  # its stub lacks it
        (directory / f"rank-{rank()}.json").write_bytes(dump())
