"""Worker processes: start this node's through torch's elastic agent, or join those of torchrun.

A worker is named as `"module:function"`, so that only the workers import it. It is called on every rank as
`worker(config, run_dir)`, with torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, …) set, and makes
its own process group. What rank 0 returns, a small dict, comes back to the caller.
"""

import gc
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from twohop.trainer import errors
from twohop.trainer.clusters.nodes import Nodes
from twohop.trainer.clusters.step import LOOPBACK
from twohop.trainer.config import LaunchConfig
from twohop.trainer.errors import ConfigError, Interrupted, UserError, WorkerError
from twohop.trainer.launching import prefork

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
POLL_S = 0.05  # between two looks at how many workers have been started
# glibc gives large blocks back to the kernel and faults them in again at every step; keeping them makes expert
# layers about a quarter faster on the CPU. A value that the user has set wins.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "67108864"}


class Launchable(Protocol):
    """A configuration that says how many processes work on it."""

    launch: LaunchConfig


def joins_outer_launcher() -> bool:
    """Whether torchrun or a cluster's launcher has started this process as one of its ranks."""
    return "RANK" in os.environ


def world_size(config: LaunchConfig, nodes: Nodes | None = None) -> int:
    """Number of ranks that will work: the outer launcher's, or `launch.nproc` on each of `nodes`, by default here."""
    return int(os.environ["WORLD_SIZE"]) if joins_outer_launcher() else config.nproc * (nodes or Nodes()).count


def start(worker: str, config: Launchable, run_dir: Path | None, nodes: Nodes | None = None) -> dict[str, Any]:
    """Run `worker` on this node's ranks and return the first one's result; under an outer launcher, this rank's own.

    Args:
        worker: `"module:function"`.
        config: validated; it travels to the workers as it is.
        run_dir: decided by the caller; None where it is not the only one, so that rank 0 decides and broadcasts.
        nodes: those that call this together; by default this one alone.

    Raises:
        UserError: bad input that the first failing rank has seen; its class and message are kept.
        WorkerError: anything else that ended a worker, with the rank and one traceback.
        SystemExit: a signal; every worker has ended by then. The code is 75, EX_TEMPFAIL, if they have saved a
            checkpoint before, and 128 + number of the signal if not.
    """
    if joins_outer_launcher():
        return _join(worker, config, run_dir)
    with preloading(worker, config.launch), TemporaryDirectory(prefix="twohop-") as failures:
        return _start_workers(worker, config, run_dir, nodes or Nodes(), failures)


@contextmanager
def preloading(worker: str, config: LaunchConfig) -> Iterator[None]:
    """Inside, a server imports what `worker` needs, for `start` to fork this node's ranks from.

    `start` does so itself; who has something to do before it begins with this, and has it done meanwhile. No effect
    under an outer launcher, and inside another.
    """
    if joins_outer_launcher() or prefork.is_serving():
        yield
        return
    resource_tracker.ensure_running()  # its start, otherwise the server's, unblocks signals
    with ExitStack() as stack:
        with _signals_blocked():  # in this process, until it has torch, and in the server, which only we may end
            with _environment(config):
                stack.enter_context(prefork.serving(worker))
            import torch.distributed.launcher.api  # noqa: F401 (both import torch now, on a core of their own)
        yield


def _start_workers(
    worker: str, config: Launchable, run_dir: Path | None, nodes: Nodes, failures: str
) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    launch = config.launch
    with _signals_held(launch.nproc, nodes), _environment(launch):
        try:
            agent = elastic_launch(_agent_config(launch, nodes), _work)
            results = agent(worker, config, run_dir, failures)
            return results[min(results)]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            cause = _first_cause(Path(failures), rank, failure.exitcode)
            raise _exit_for_now(cause) if isinstance(cause, Interrupted) else cause from None
        except RendezvousError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"the {nodes.count} nodes did not all meet at {nodes.endpoint} within comm.init_timeout_s="
                f"{nodes.patience_s:g} ({reason}): look at what the others say, or raise it"
            ) from None
        except SignalException as stop:
            cause = _first_cause(Path(failures), 0, 0)
            if isinstance(cause, Interrupted):
                raise _exit_for_now(cause) from None
            print(f"twohop: stopped by {stop.sigval.name}", file=sys.stderr)
            raise SystemExit(128 + stop.sigval) from None


def check_port(port: int | None) -> None:
    """Raise a ConfigError if the rendezvous port is taken: the agent would wait for an answer on it instead."""
    if port is None:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the agent's own server does
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"launch.port={port} cannot be used ({error.strerror}): choose another, or null for a free one"
            ) from None


def _agent_config(config: LaunchConfig, nodes: Nodes) -> Any:
    from torch.distributed.launcher.api import LaunchConfig as AgentConfig

    for name in logging.root.manager.loggerDict:  # each has a level of its own; _first_cause tells what they would
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return AgentConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=config.nproc,
        run_id=nodes.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint or f"{LOOPBACK}:{config.port or 0}",
        rdzv_configs=_rendezvous_options(nodes),
        local_addr=nodes.own_address,
        max_restarts=0,
        start_method="forkserver",
        shutdown_timeout=math.ceil(config.grace_s),
        signals_to_handle=",".join(number.name for number in (*STOP_SIGNALS, signal.SIGQUIT)),
    )


def _rendezvous_options(nodes: Nodes) -> dict[str, Any]:
    if nodes.endpoint is None:
        return {"is_host": True}
    patience_s = math.ceil(nodes.patience_s)
    options = {"join_timeout": patience_s, "read_timeout": patience_s}
    return options if nodes.is_host is None else {**options, "is_host": nodes.is_host}


@contextmanager
def _environment(config: LaunchConfig) -> Iterator[None]:
    """What workers inherit and read while they start, before any code of ours runs in them."""
    before = dict(os.environ)
    os.environ.update({**ALLOCATOR, **prefork.FORKABLE, **before, "OMP_NUM_THREADS": str(config.omp_threads)})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Inside, a stop signal waits; processes that are started keep it so."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _signals_held(workers: int, nodes: Nodes) -> Iterator[None]:
    """Workers start with signals blocked, as the server has them, which wait until `_work` lets them in.

    Here, they wait until all workers are started and the agent can end them; then a thread opens itself to signals,
    and Python runs their handlers in the main thread all the same. So it does while no worker is there because other
    nodes have yet to come, which may take long. The agent installs handlers and leaves them: the usual ones come back.
    """
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    done = threading.Event()

    def open_to_signals() -> None:
        while (started := len(multiprocessing.active_children())) < workers and not done.wait(POLL_S):
            waits = nodes.count > 1 and started == 0
            signal.pthread_sigmask(signal.SIG_UNBLOCK if waits else signal.SIG_BLOCK, STOP_SIGNALS)
        done.wait(POLL_S)  # the agent takes note of the last worker
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        done.wait()

    with _signals_blocked():
        threading.Thread(target=open_to_signals, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _work(worker: str, config: Launchable, run_dir: Path | None, failures: str) -> dict[str, Any]:
    """Body of a worker process. A failure is written down for the parent, which alone speaks to the terminal."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # end at once and silently: the parent says why
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    gc.freeze()  # collections would touch, and so copy, memory that the workers share
    gc.enable()
    try:
        return _resolve(worker)(config, run_dir)
    except Exception as error:
        rank = os.environ["RANK"]
        record = {
            "time": time.time(),
            "rank": int(rank),
            "kind": type(error).__name__,
            "message": str(error),
            "is_user_error": isinstance(error, UserError),
            "traceback": traceback.format_exc(),
        }
        Path(failures, f"{rank}.json").write_text(json.dumps(record))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # peers must notice now; an orderly exit may wait for them


def _join(worker: str, config: Launchable, run_dir: Path | None) -> dict[str, Any]:
    """Be one rank of an outer launcher; torchrun tells at the end which rank failed first, and why."""
    try:
        return _resolve(worker)(config, run_dir)
    except Interrupted as stop:
        raise _exit_for_now(stop if os.environ["RANK"] == "0" else None) from None
    except Exception as error:
        rank, text = os.environ["RANK"], traceback.format_exc()
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
            text = ""  # torchrun shows it
        if not isinstance(error, UserError):
            raise WorkerError(f"rank {rank} failed: {type(error).__name__}: {error}", text) from None
        if rank != "0":
            raise WorkerError(f"rank {rank}: {error}") from None
        raise


def _exit_for_now(stop: Interrupted | None) -> SystemExit:
    """The end of a process that is to be started again; says why, if it is the one that speaks to the terminal."""
    if stop is not None:
        print(f"twohop: {stop}", file=sys.stderr, flush=True)
    return SystemExit(os.EX_TEMPFAIL)


def _resolve(worker: str) -> Any:
    module, _, function = worker.partition(":")
    return getattr(import_module(module), function)


def _first_cause(failures: Path, rank: int, exitcode: int) -> Exception:
    """What to tell about a failed job: bad input, or else a death by signal, or else the earliest exception.

    One rank's failure makes the others lose their connections, often before the agent looks: so the agent's choice
    (rank, exitcode) counts only where no worker has written anything down that explains it.
    """
    records = sorted((json.loads(path.read_text()) for path in failures.glob("*.json")), key=lambda r: r["time"])
    for record in records:
        if record["is_user_error"]:
            return getattr(errors, record["kind"], UserError)(record["message"])
        if record["kind"] == Interrupted.__name__:
            return Interrupted(record["message"])
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return WorkerError(f"rank {rank} was ended by {name}{hint}")
    if records:
        first = records[0]
        return WorkerError(f"rank {first['rank']} failed: {first['kind']}: {first['message']}", first["traceback"])
    return WorkerError(f"rank {rank} ended with exit code {exitcode}")
