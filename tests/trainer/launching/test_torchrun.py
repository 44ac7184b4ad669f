"""A training under torchrun whose nodes come and go: each an agent of torchrun with one rank, on this machine."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_overrides, write_corpus
from tests.trainer.launching import paced
from tests.trainer.launching.test_launch import IMPORTED, wait_until
from twohop.trainer.monitoring.metrics import read_metrics

STEPS = 80
# Six micro-batches, so that 1, 2 and 3 ranks have equally many.
LENGTHS = [f"train.steps={STEPS}", "train.global_batch=6", "train.micro_batch=1"]
EVERY = 5  # steps between checkpoints
PATIENCE_S = 200  # for a node to come on a busy machine
SLOWLY, AT_ONCE = "3", "0"  # seconds before a step: while a node is awaited, and otherwise
RENDEZVOUS = "is_host=false,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=4"


class Job:
    """The nodes of a training in a folder, and the store where they meet, which outlives all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.nodes: list[subprocess.Popen] = []
        self.pause(AT_ONCE)

    def add_node(self) -> subprocess.Popen:
        """Another node, by the same command as all others."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:4", "--nproc-per-node=1"]
        torchrun += ["--max-restarts=20", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.store.port}"]
        torchrun += ["--rdzv-id=job", f"--rdzv-conf={RENDEZVOUS}", paced.__file__]
        own = [*LENGTHS, f"checkpoint.every={EVERY}", "resume=auto", f"comm.init_timeout_s={PATIENCE_S}"]
        environment = {
            **os.environ,
            "PYTHONPATH": IMPORTED,
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see docs/training.md
        }
        with self.log(len(self.nodes)).open("w") as log:
            node = subprocess.Popen(
                [*torchrun, *tiny_overrides(self.folder), *own],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.nodes.append(node)
        return node

    def log(self, number: int) -> Path:
        return self.folder / f"node-{number}.log"

    def pause(self, seconds: str) -> None:
        """How long ranks wait before each step from now on."""
        beside = self.folder / "pause-next"
        beside.write_text(seconds)
        beside.rename(self.folder / paced.PAUSE)

    def taken(self) -> list[tuple[int, int]]:
        """(step, number of ranks) of all steps that have begun, in the order of time."""
        path = self.folder / paced.TAKEN
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(step), int(ranks)) for step, ranks in map(str.split, lines)]

    def wait_for_ranks(self, ranks: int) -> None:
        """Until the newest three steps have been taken by so many ranks."""
        wait_until(lambda: [size for _, size in self.taken()[-3:]] == [ranks] * 3, PATIENCE_S)

    def told(self) -> str:
        """What all nodes have said."""
        return "\n".join(self.log(number).read_text() for number in range(len(self.nodes)))


def kill(node: subprocess.Popen) -> None:
    """As a machine that is gone: the agent and its rank, without a word."""
    agent = psutil.Process(node.pid)
    for process in [agent, *agent.children(recursive=True)]:
        process.kill()
    node.wait()


def stop(*nodes: subprocess.Popen) -> list[int]:
    """What a batch system does; the exit codes of the agents."""
    for node in nodes:
        node.send_signal(signal.SIGTERM)
    return [node.wait(PATIENCE_S) for node in nodes]


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    "TWOHOP_SLOW_TESTS" not in os.environ, reason="thirteen starts take minutes: set TWOHOP_SLOW_TESTS=1"
)
def test_nodes_come_and_go_and_the_run_goes_on_as_if_it_had_never_been_broken(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (unbroken,) = run_distributed(runs.curve, 1, tmp_path, LENGTHS, init=False, timeout=PATIENCE_S)
    job = Job(tmp_path)
    try:
        first, second = job.add_node(), job.add_node()
        job.wait_for_ranks(2)
        job.pause(SLOWLY)
        third = job.add_node()
        job.wait_for_ranks(3)
        assert stop(second) == [1]  # torchrun's exit code, of any signal
        job.wait_for_ranks(2)
        fourth = job.add_node()
        job.wait_for_ranks(3)
        kill(third)
        job.wait_for_ranks(2)
        job.pause(AT_ONCE)
        assert stop(first, fourth) == [1, 1]
        stopped = job.taken()[-1][0]
        assert f"stopped by SIGTERM after step {stopped}, which is saved; resume=auto goes on" in job.told()
        assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:08d}").is_dir()
        assert job.add_node().wait(PATIENCE_S) == 0
    finally:
        for node in job.nodes:
            if node.poll() is None:
                kill(node)

    taken = job.taken()
    sizes = [ranks for _, ranks in taken]
    changes = [ranks for before, ranks in zip([0, *sizes], sizes, strict=False) if ranks != before]
    assert changes[-6:] == [2, 3, 2, 3, 2, 1]  # before them, perhaps, the first node alone
    # A node that comes and a signal lose no step; one that dies loses those since a checkpoint, and the one it was in.
    repeated = len(taken) - STEPS
    assert 0 <= repeated <= EVERY, taken
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, (loss, norm) in zip(records, unbroken[0], strict=True):
        assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5), record["step"]
    assert len(re.findall(r"continuing from step \d+", job.told())) == len(changes) - 1
