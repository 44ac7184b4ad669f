"""Against a real SLURM of two nodes on this machine, where its programs are installed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_overrides
from tests.trainer import slurm
from twohop.trainer import cli
from twohop.trainer.monitoring.metrics import read_metrics

REASON = slurm.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"SLURM {REASON}")
PATIENCE_S = 250.0

# What a task finds out about itself; imports no torch.
TASK = """\
import os
from twohop.trainer.clusters.step import Step, adopt_step
adopt_step()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
step = Step.of(os.environ)
print([os.environ.get(name) for name in names], len(step.tasks), step.node, step.first_host)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with slurm.running(tmp_path_factory.mktemp("slurm")) as config:
        yield config


@pytest.fixture(autouse=True)
def in_a_folder(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(cluster))


def wait_for(path: Path, words: str, log: Path) -> None:
    """Until a file holds some words; what the job said is told if it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and words in path.read_text()):
        said = log.read_text() if log.exists() else "nothing"
        assert time.monotonic() < deadline, f"{path} never held {words!r}; the job said:\n{said}"
        time.sleep(0.2)


@pytest.mark.parametrize("distribution", ["block", "cyclic"])
def test_tasks_know_their_ranks(distribution: str) -> None:
    options = ["--nodes=2", "--ntasks-per-node=2", f"--distribution={distribution}"]
    ran = subprocess.run(["srun", *options, sys.executable, "-c", TASK], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == [
        f"['{rank}', '4', '{rank % 2}', '2'] 2 {rank // 2} n1" for rank in range(4)
    ]


def test_one_task_on_each_node_is_no_rank() -> None:
    options = ["--nodes=2", "--ntasks-per-node=1"]
    ran = subprocess.run(["srun", *options, sys.executable, "-c", TASK], capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == [f"[None, None, None, None] 2 {node} n1" for node in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    "TWOHOP_SLOW_TESTS" not in os.environ, reason="SLURM requeues after minutes: set TWOHOP_SLOW_TESTS=1"
)
def test_submitted_run_is_saved_when_its_time_is_over_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = tmp_path / "run"
    overrides = [*tiny_overrides(tmp_path), "train.steps=60", "launch.nproc=1", "train.global_batch=2"]
    assert cli.run(["submit", *overrides, "cluster=slurm", "cluster.slurm.minutes=10"]) == 0
    number = capfd.readouterr().out.split()[-1]
    log = tmp_path / "runs" / f"slurm-{number}.log"
    wait_for(folder / "metrics.jsonl", '"step": 3,', log)
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)
    wait_for(folder / "summary.json", '"steps": 60', log)
    said = log.read_text()
    assert "goes on from its checkpoint once it is started again" in said
    assert "start 2, on" in said
    assert "continuing from step" in said
    steps = [record["step"] for record in read_metrics(folder) if record["kind"] == "train"]
    assert steps == list(range(1, 61))


@pytest.mark.timeout(600)
def test_sweep_is_jobs_of_slurm_and_its_table_is_here(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    overrides = [arg for arg in tiny_overrides(tmp_path) if not arg.startswith("run.dir")]
    own = ["train.steps=1", "cluster=slurm", "hydra.sweep.dir=sweep", "seed=7"]
    assert cli.run(["train", "--multirun", *overrides, *own]) == 0
    out = capfd.readouterr().out
    assert "sweep: 1 jobs, 0 failed" in out
    assert "validation loss" not in out  # that is in the job's log
    assert Path("sweep/0/summary.json").exists()
    scripts = list(Path("sweep/.submitit").rglob("*submission.sh"))
    assert "#SBATCH --signal=USR1@120" in scripts[0].read_text().splitlines()
    assert os.environ["SLURM_CONF"]
