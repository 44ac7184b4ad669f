"""The world of ranks: how a worker joins it, and how its ranks agree on small things."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from twohop.comm import CommError, PhaseClock
from twohop.comm.clock import EXPOSED
from twohop.trainer.config import CommConfig
from twohop.trainer.errors import UserError
from twohop.trainer.launching.meeting import meet

T = TypeVar("T")

# The last collectives are kept in memory, and written down when NCCL's watchdog finds one that takes too long; see
# `twohop.trainer.faults`. A value that the user has set wins.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}

_clock = PhaseClock()  # of this process; what it measures matters to a run alone


def join_world(config: CommConfig) -> torch.device:
    """Initialise the default process group from torchrun's variables and return this rank's device.

    Without RANK in the environment this process is a world of its own. Ranks that have not come after
    `init_timeout_s` are named; later, no wait is longer than `timeout_s`. NCCL if every rank on this host has a GPU
    of its own, else gloo on the CPU.

    Raises:
        UserError: some ranks did not come.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return device
    patience = timedelta(seconds=config.init_timeout_s)
    try:
        store, own_rank, num_ranks = next(dist.rendezvous("env://", timeout=patience))
        store = meet(store, own_rank, num_ranks, patience)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"rank {os.environ['RANK']} could not meet the others at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within comm.init_timeout_s={config.init_timeout_s}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for key, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(key, value)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        store=store,
        rank=own_rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if use_gpu else None,
    )
    return device


def leader_first(make: Callable[[], T], patience_s: float) -> T:
    """`make()` on every rank, first on local rank 0 of each host, whose caches the others then find.

    Waits on the store and not in a collective: it may take longer than any step, up to `patience_s` seconds.
    """
    if not dist.is_initialized():
        return make()
    store = dist.distributed_c10d._get_default_store()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    key = f"leader_first/{rank() - local_rank}"
    if local_rank != 0:
        store.wait([key], timedelta(seconds=patience_s))
        return make()
    try:
        return make()
    finally:  # also after an error: the others then meet the same one themselves
        store.set(key, "")


def rank() -> int:
    """This rank in the world; 0 in a world of one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Ranks in the world; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Around collectives: a peer that died or hangs becomes a `CommError` that says what was exchanged.

    What happens inside counts as exposed communication on the clock of `time_exchanges`.
    """
    with _clock.phase(EXPOSED, what):
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CommError(f"rank {rank()}, {what}: exchange among all ranks failed: {reason}") from error


def time_exchanges(clock: PhaseClock) -> None:
    """From now on `exchanging` counts on `clock`: the process group is one for the process, and so is this."""
    global _clock
    _clock = clock


def sum_over_world(tensor: torch.Tensor, what: str) -> None:
    """Add up `tensor` over all ranks, in place; every rank gets the same bits and every rank must call this."""
    if world_size() > 1:
        with exchanging(what):
            dist.all_reduce(tensor)


def max_over_world(tensor: torch.Tensor, what: str) -> None:
    """The largest of all ranks' values, element by element, in place; every rank must call this."""
    if world_size() > 1:
        with exchanging(what):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, in the order of ranks. Every rank of the world must call this; for small things.

    A `group` is another one of all ranks, for exchanges beside those of training.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with exchanging("agreement"):
        dist.all_gather_object(values, value, group)
    return values


def say(text: str) -> None:
    """Print on rank 0 alone."""
    if rank() == 0:
        print(text, flush=True)


def open_world_of_one() -> None:
    """Give a process without peers a process group, for libraries that want one; no effect where there is one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def leave_world() -> None:
    """Destroy the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
