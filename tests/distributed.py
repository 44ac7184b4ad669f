"""Multi-process tests as ordinary functions: `run_distributed(fn, nproc, *args)` runs `fn` on a gloo world.

Importing torch and DeepSpeed costs seconds, so one process does it and all workers are forked from it. They stay
warm for some calls, each of which makes a fresh world of any size out of them. Where a rank failed, died, hung or was
killed, all are replaced at the next call.
"""

import atexit
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist

CALLS = 25  # of a worker: every world leaves threads of gloo behind, which spin if a peer was lost
GRACE_S = 5.0  # after a rank failed, its peers get this long to notice before they are killed
# What workers have imported when they begin. None of it starts a thread, which a fork would lose.
PRELOADED = ["pytest", "torch._dynamo", "deepspeed", "twohop.trainer.launching.workers"]


class RemoteError(Exception):
    """The traceback of the rank that failed, as the cause of the exception that is raised here."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


class Worker:
    """One warm process and the pipe to it."""

    def __init__(self) -> None:
        self.calls = 0
        self.pipe, theirs = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(theirs,), daemon=True)
        with mock.patch.object(forkserver, "connect_to_new_process", _server.connect_to_new_process):
            self.process.start()
        theirs.close()  # so that the death of the worker is an EOF here

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_workers: list[Worker] = []
# Where a GPU is, the imports look for it, and a process forked after that cannot use it.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_server = forkserver.ForkServer()  # not the one of all code in this process: tests are about its beginning and end
_server.set_forkserver_preload(PRELOADED)


def run_distributed(
    fn: Callable[..., Any],
    nproc: int,
    *args: Any,
    timeout: float = 60.0,
    init: bool = True,
    env: dict[str, str] | None = None,
    lost: Collection[int] = (),
    keep: bool = True,
) -> list[Any]:
    """Runs `fn(*args)` on ranks 0 … nproc-1 and returns what each returned, in the order of ranks.

    `fn` must be importable (a function at the top of a test module); `args` and results are pickled. Each rank sees
    torchrun's variables plus `env`. With `init` the default process group is initialised before and destroyed after;
    without it `fn` does so itself (`env://` works). If ranks fail, the first failure is raised here as it was
    raised there, with the rank's traceback as its cause; no answer in `timeout` seconds is a `TimeoutError`.
    Ranks in `lost` are expected to die or to stop: theirs is None. Without `keep` the workers begin and end with the
    call, for an `fn` that leaves something behind in its process, or finds fault with what others left.
    """
    if keep:
        # A process keeps its rank for life: torch caches what it once found out about its place in a mesh.
        _workers.extend(Worker() for _ in range(nproc - len(_workers)))
        _workers[:] = [worker if worker.process.is_alive() else Worker() for worker in _workers]
    # The store lives here, as it lives in torchrun's agent: no port is ever chosen before it is bound.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    base = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    team = _workers[:nproc] if keep else [Worker() for _ in range(nproc)]
    for rank, worker in enumerate(team):
        rank_env = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (env or {})
        # The function is pickled by name: the worker unpickles it only after it has our sys.path.
        worker.pipe.send_bytes(pickle.dumps((sys.path, rank_env, init, timeout, pickle.dumps((fn, args)))))
        worker.calls += 1
    failed = True
    try:
        results = _collect(team, time.monotonic() + timeout, timeout, lost)
        failed = False
        return results
    finally:
        for worker in team:
            if failed or lost or not keep or worker.calls == CALLS:
                worker.kill()


def _collect(team: list[Worker], deadline: float, timeout: float, lost: Collection[int]) -> list[Any]:
    results: dict[int, Any] = dict.fromkeys(lost)
    failures: list[tuple[float, int, BaseException, str]] = []
    waiting: dict[Connection, int] = {worker.pipe: rank for rank, worker in enumerate(team) if rank not in lost}
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for pipe in cast(list[Connection], ready):
            rank = waiting.pop(pipe)
            try:
                results[rank], failure = pickle.loads(pipe.recv_bytes())
            except EOFError:
                team[rank].process.join()
                died = RuntimeError(f"rank {rank} died, exit code {team[rank].process.exitcode}")
                failure = (0.0, died, "")  # a death comes first: it explains the errors of its peers
            if failure is not None:
                moment, error, trace = failure
                failures.append((moment, rank, error, trace))
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for rank in (*waiting.values(), *lost):
        team[rank].kill()
    if failures:
        _, rank, error, trace = min(failures, key=lambda failure: failure[0])
        raise error from RemoteError(f"rank {rank}:\n{trace}")
    if waiting:
        raise TimeoutError(f"ranks {sorted(waiting.values())} gave no answer in {timeout} s")
    return [results[rank] for rank in range(len(team))]


def _serve(pipe: Connection) -> None:
    """A worker's life: one task after the other, until the parent closes the pipe."""
    torch.set_num_threads(1)
    gc.freeze()  # collections would touch, and so copy, memory that the workers share
    # torch reads the size of its flight recorder once in a process: as `join_world` sets it.
    recorder = {"TORCH_FR_BUFFER_SIZE": "2000"}
    clean_env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | recorder
    while True:
        try:
            task = pipe.recv_bytes()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(clean_env)
        torch.manual_seed(0)
        try:
            answer = pickle.dumps((_run_task(task), None))
        except BaseException as error:  # also SystemExit: the parent decides what it means
            answer = pickle.dumps((None, (time.monotonic(), _picklable(error), traceback.format_exc())))
        pipe.send_bytes(answer)
        if dist.is_initialized():  # only now: closed connections make other ranks fail, and the first failure counts
            dist.destroy_process_group()


def _run_task(task: bytes) -> Any:
    path, env, init, timeout, call = pickle.loads(task)
    sys.path[:] = path
    os.environ.update(env)
    fn, args = pickle.loads(call)
    if init:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    result = fn(*args)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early would close connections that its peers still read
    return result


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


@atexit.register
def _kill_workers() -> None:
    for worker in _workers:
        worker.kill()
