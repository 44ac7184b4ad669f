"""Worker processes: what they get, what a failure of one looks like, and that none is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twohop.trainer import cli
from twohop.trainer.config import Config, LaunchConfig, TrainConfig
from twohop.trainer.errors import ConfigError, DataError, WorkerError
from twohop.trainer.launching import launch

WORKERS = "tests.trainer.launching.launch_workers"
ROOT = Path(__file__).parents[3]
# What other processes import: these tests, and the package that is imported here.
IMPORTED = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def start(name: str, run_dir: Path, nproc: int = 2) -> dict:
    return launch.start(f"{WORKERS}:{name}", Config(launch=LaunchConfig(nproc=nproc)), run_dir)


def test_workers_get_configuration_environment_and_a_world_and_rank_0_answers(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")  # a user's own setting wins
    config = Config(train=TrainConfig(steps=9), launch=LaunchConfig(nproc=2, omp_threads=3))
    before = dict(os.environ), [signal.getsignal(number) for number in launch.STOP_SIGNALS]
    assert launch.start(f"{WORKERS}:answer", config, tmp_path) == {
        "steps": 9,
        "run_dir": str(tmp_path),
        "sum_of_ranks": 1,
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
        "MALLOC_MMAP_MAX_": "7",
        "MALLOC_TOP_PAD_": launch.ALLOCATOR["MALLOC_TOP_PAD_"],
    }
    assert (dict(os.environ), [signal.getsignal(number) for number in launch.STOP_SIGNALS]) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert capfd.readouterr() == ("", "")


def test_one_process_on_a_given_port_goes_the_same_way(tmp_path):
    port = free_port()
    config = Config(launch=LaunchConfig(nproc=1, port=port))
    result = launch.start(f"{WORKERS}:answer", config, tmp_path)
    assert (result["RANK"], result["WORLD_SIZE"], result["sum_of_ranks"]) == ("0", "1", 0)


def test_bad_input_seen_by_one_worker_keeps_its_class_and_message(tmp_path, capfd):
    with pytest.raises(DataError, match=re.escape("data.files=['gone.txt']: no such file")):
        start("refuse_on_rank_1", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_unexpected_exception_shows_one_traceback_and_the_rank_that_failed_first(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("twohop.trainer.commands.train.WORKER", f"{WORKERS}:break_on_rank_1")
    assert cli.run(["train", "model=dense", "launch.nproc=2"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("Traceback") == 1
    assert "in break_on_rank_1" in err
    assert err.splitlines()[-1] == "twohop: error: rank 1 failed: ZeroDivisionError: the first cause"


def test_killed_worker_is_named_with_its_signal(tmp_path, capfd):
    with pytest.raises(WorkerError, match="rank 1 was ended by SIGKILL"):
        start("kill_rank_1", tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("stop", "code", "early"),
    [
        (signal.SIGINT, 130, True),
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 143, False),
        (signal.SIGKILL, -9, False),
    ],
)
def test_stopping_ends_every_process_quietly(stop, code, early, tmp_path):
    """Early: amid the imports. Ctrl-C reaches the whole process group, the others the parent alone."""
    program = (
        "import sys\n"
        "from twohop.trainer import cli\n"
        "from twohop.trainer.commands import train\n"
        f"train.WORKER = '{WORKERS}:wait_to_be_stopped'\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.run(['train', 'model=dense', 'launch.nproc=2', 'run.dir=run']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": IMPORTED},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    try:
        if early:
            wait_until(lambda: len(children(parent.pid)) >= 2)  # the resource tracker and the server
        else:
            wait_until(lambda: len(list(tmp_path.glob("run/pid-*"))) == 2)
            assert sorted(len(children(child)) for child in children(parent.pid)) == [0, 2]  # tracker, server
        (os.killpg if stop is signal.SIGINT else os.kill)(parent.pid, stop)
        err = parent.communicate(timeout=60)[1]
        wait_until(lambda: not group_exists(parent.pid))
    finally:
        if group_exists(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)
    assert parent.returncode == code
    if stop is not signal.SIGKILL:  # Python's resource tracker, which outlives it, tells what it had to clean up
        assert err == f"twohop: stopped by {stop.name}\n"


def test_taken_port_is_refused():
    with launch.socket.socket() as taken:
        taken.bind((launch.LOOPBACK, 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"launch\.port=\d+ cannot be used \(Address already in use\): choose"):
            launch.check_port(taken.getsockname()[1])
    launch.check_port(None)


def test_under_an_outer_launcher_the_worker_runs_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.world_size(LaunchConfig(nproc=5)) == 2
    assert launch.start(f"{WORKERS}:own_pid", Config(), tmp_path) == {"pid": os.getpid()}
    with pytest.raises(WorkerError, match="rank 1: no dense models today"):
        launch.start(f"{WORKERS}:refuse_dense", Config(), tmp_path)
    with pytest.raises(WorkerError, match="rank 1 failed: KeyError: 'LOCAL_RANK'") as caught:
        launch.start(f"{WORKERS}:answer", Config(), tmp_path)
    assert "launch_workers.py" in caught.value.traceback

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))  # torchrun shows what is in it
    with pytest.raises(WorkerError, match="rank 1 failed") as caught:
        launch.start(f"{WORKERS}:answer", Config(), tmp_path)
    assert caught.value.traceback == ""
    assert "launch_workers.py" in (tmp_path / "error.json").read_text()

    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DataError):
        launch.start(f"{WORKERS}:refuse_dense", Config(), tmp_path)


def free_port() -> int:
    with launch.socket.socket() as probe:
        probe.bind((launch.LOOPBACK, 0))
        return probe.getsockname()[1]


def wait_until(holds, patience_s: float = 60) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def group_exists(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True
