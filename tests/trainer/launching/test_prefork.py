"""The process that workers are forked from has nothing that a forked process could not use."""

import os
import subprocess
import sys

import pytest

from twohop.trainer.commands import train
from twohop.trainer.config import LaunchConfig
from twohop.trainer.launching import launch, prefork

# As the server imports: the hook first. Whoever looks for a GPU meanwhile would open it.
SERVER = f"""
import gc, os, sys
from importlib import import_module
import_module({prefork.HOOK!r})
import torch
torch.cuda.is_available = torch.cuda.device_count = lambda: sys.exit("an import asks for GPUs")
import_module({prefork.AGENT!r})
import_module({train.WORKER.partition(":")[0]!r})
assert "" not in sys.path
assert not gc.isenabled()
assert not torch.distributed.is_initialized()
assert not torch.cuda.is_initialized()
assert {{"deepspeed", "wandb", "datasets", "transformers"}}.isdisjoint(sys.modules)
print(len(os.listdir("/proc/self/task")), "thread")
"""


def test_server_has_one_thread_no_process_group_and_has_not_looked_for_a_gpu():
    environment = {**prefork.FORKABLE, **os.environ, "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, "-c", SERVER], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 thread\n", "")


@pytest.fixture
def no_server() -> None:
    """Other tests of this process may have left one, of those that put something in the place of `serving`."""
    prefork._stop()


@pytest.mark.usefixtures("no_server")
def test_server_lives_as_long_as_its_user_whatever_happens():
    def fail() -> None:
        with launch.preloading("json:loads", LaunchConfig()):
            assert prefork.is_serving()
            with launch.preloading("json:loads", LaunchConfig()):  # no second one
                pass
            assert prefork.is_serving()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not prefork.is_serving()


@pytest.mark.usefixtures("no_server")
def test_under_an_outer_launcher_there_is_no_server(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with launch.preloading("json:loads", LaunchConfig()):
        assert not prefork.is_serving()
