"""A process that imports what workers need once, so that this node's ranks are forked from it and import nothing.

It is the fork server of Python's multiprocessing: a fresh interpreter of one thread, which has seen neither a process
group nor a GPU. torch's elastic agent asks it for workers.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

# Imported first, and by this process alone: it prepares the server.
HOOK = "twohop.trainer.launching.prefork_hook"
# torch's agent sends workers a function of this module.
AGENT = "torch.distributed.elastic.multiprocessing.api"
# A forked process can use neither threads nor the GPU of the one before it. OpenBLAS would start threads when numpy is
# imported; and whoever asks at import whether there is a GPU must ask the driver's library, not open the GPU.
FORKABLE = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


@contextmanager
def serving(worker: str) -> Iterator[None]:
    """Inside, a server imports the module of `worker` ("module:function") and serves this process's workers.

    Does not wait for it: this process can import what it needs itself meanwhile. The server and its workers have the
    environment of now, in which `FORKABLE` should be, and the stop signals that are blocked now. A module that the
    server cannot find is left to the workers, whose errors are heard.
    """
    multiprocessing.set_forkserver_preload([HOOK, AGENT, worker.partition(":")[0]])
    forkserver.ensure_running()
    try:
        yield
    finally:
        _stop()


def is_serving() -> bool:
    """Whether this process is inside of `serving`."""
    return _server()._forkserver_pid is not None


def _stop() -> None:
    """End the server; a worker that is still there ends with it.

    multiprocessing stops it only for its own tests, and waits for processes that workers may have left behind.
    """
    server = _server()
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


def _server() -> Any:
    return forkserver._forkserver
