"""Where workers come from: SLURM's variables, nodes that meet, and what batch systems are given to read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow.training import ApiClient
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from tests.trainer.launching.test_launch import IMPORTED
from twohop.trainer import cli
from twohop.trainer.clusters.nodes import Nodes, find_nodes
from twohop.trainer.clusters.step import Step, adopt_step
from twohop.trainer.config import ClusterConfig, ClusterKind, Config, KubernetesConfig, SlurmConfig
from twohop.trainer.errors import ConfigError, UserError
from twohop.trainer.launching import launch

ROOT = Path(__file__).parents[2]
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM") or name in TORCHRUN]:
        monkeypatch.delenv(name)


def step(node: int, local: int, tasks: str, hosts: str = "gpu[07-09,12],login", **more: str) -> dict[str, str]:
    """What srun tells a task; PROCID is no guide where tasks are dealt out in another order."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "2",
        "SLURM_PROCID": str(99 * node + local),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        **more,
    }


# A task of SLURM.


def test_tasks_of_a_step_with_several_on_a_node_are_ranks_counted_node_by_node():
    seen = {}
    for node, tasks in enumerate([2, 2, 1]):
        for local in range(tasks):
            environ = step(node, local, "2(x2),1")
            adopt_step(environ)
            seen[int(environ["RANK"])] = [environ[name] for name in TORCHRUN[1:]]
    assert seen == {
        0: ["5", "0", "2", "gpu07", "21102"],
        1: ["5", "1", "2", "gpu07", "21102"],
        2: ["5", "0", "2", "gpu07", "21102"],
        3: ["5", "1", "2", "gpu07", "21102"],
        4: ["5", "0", "1", "gpu07", "21102"],
    }


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a", "a"),
        ("a,b[1-2]", "a"),
        ("b[03,07-09]", "b03"),
        ("r[1-2]n[4,6]-ib,c", "r1n4-ib"),
        ("n[10-11].org", "n10.org"),
    ],
)
def test_first_host_of_a_list(hosts, first):
    found = Step.of(step(0, 0, "2(x2)", hosts))
    assert found is not None
    assert found.first_host == first


def test_tasks_of_one_node_meet_without_its_name_and_at_a_given_port():
    environ = step(0, 1, "2", MASTER_PORT="31000")
    adopt_step(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "31000")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {key: value for key, value in step(0, 0, "4").items() if key != "SLURM_STEP_ID"},  # sbatch's own script
        step(1, 0, "1(x3)"),
        step(0, 1, "2", RANK="7"),  # torchrun inside of srun
    ],
)
def test_others_are_left_alone(environ):
    before = dict(environ)
    adopt_step(environ)
    assert environ == before


def test_a_rank_that_sees_its_own_gpu_alone_is_refused():
    environ = step(0, 1, "2", SLURM_GPUS_PER_TASK="1", CUDA_VISIBLE_DEVICES="1")
    with pytest.raises(
        ConfigError, match=r"--gpus-per-task=1 shows a rank CUDA_VISIBLE_DEVICES=1 alone.*--gpus-per-node=2"
    ):
        adopt_step(environ)
    adopt_step(environ | {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_task_trains_as_a_rank(monkeypatch, capfd):
    calls = []
    monkeypatch.setattr("twohop.trainer.commands.train.start", lambda *args: calls.append(args) or {})
    for name, value in step(1, 0, "2(x2)").items():
        monkeypatch.setenv(name, value)
    for name in TORCHRUN:  # what adoption sets is taken back after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert cli.run(["train", "model=pr_moe", "comm.ep_size=4"]) == 0
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("2", "4")
    _, config, run_dir, nodes = calls[0]
    assert (run_dir, nodes.count, config.comm.ep_size) == (None, 1, [4])
    assert cli.run(["train", "--multirun", "seed=1,2"]) == 2
    assert capfd.readouterr().err == ""  # rank 2 does not speak


# Nodes.


def config(name: str = "local", **cluster: Any) -> Config:
    return Config(cluster=ClusterConfig(ClusterKind(name), **cluster))


def test_nodes_of_a_step_with_one_task_on_each(monkeypatch):
    for name, value in step(1, 0, "1(x3)").items():
        monkeypatch.setenv(name, value)
    expected = Nodes(3, "gpu07:21102", False, "slurm-21102", 300.0)
    assert find_nodes(config()) == expected
    assert find_nodes(config("slurm", nodes=3, slurm=SlurmConfig())) == expected
    with pytest.raises(ConfigError, match=r"cluster\.nodes=2, but this SLURM step has 3"):
        find_nodes(config("slurm", nodes=2, slurm=SlurmConfig()))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_NODEID", "0")
    assert find_nodes(config()) == Nodes()


def test_nodes_without_a_batch_system(monkeypatch):
    several = config("torchrun", nodes=2, rdzv_endpoint="node0:29500")
    assert find_nodes(several) == Nodes(2, "node0:29500", patience_s=300.0)
    assert launch.world_size(several.launch, find_nodes(several)) == 2
    assert find_nodes(config()) == Nodes()
    for name, part in (("slurm", {"slurm": SlurmConfig()}), ("kubernetes", {"kubernetes": KubernetesConfig()})):
        with pytest.raises(ConfigError, match=f"hand one in with `twohop submit cluster={name}"):
            find_nodes(config(name, **part))
    monkeypatch.setenv("RANK", "3")
    assert find_nodes(config("kubernetes", kubernetes=KubernetesConfig())) == Nodes()


def test_own_address_is_that_of_the_way_to_the_others():
    assert Nodes().own_address == Nodes(2, "localhost:29500").own_address == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"meeting point nowhere\.invalid:29500 cannot be reached"):
        _ = Nodes(2, "nowhere.invalid:29500").own_address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_nodes_start_the_workers_of_one_world(tmp_path):
    program = (
        "import json, sys\n"
        "from twohop.trainer.launching import launch\n"
        "from twohop.trainer.clusters.nodes import Nodes\n"
        "from twohop.trainer.config import Config, LaunchConfig\n"
        "if __name__ == '__main__':\n"
        "    nodes = Nodes(2, sys.argv[1], patience_s=120)\n"
        "    config = Config(launch=LaunchConfig(nproc=1))\n"
        "    print(json.dumps(launch.start('tests.trainer.launching.launch_workers:answer', config, None, nodes)))\n"
    )
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": IMPORTED, **dict.fromkeys(launch.ALLOCATOR, "0")}
    words = [sys.executable, "program.py", f"127.0.0.1:{free_port()}"]
    nodes = [subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    try:
        answers = [json.loads(node.communicate(timeout=200)[0]) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [answer["sum_of_ranks"] for answer in answers] == [1, 1]
    assert sorted(answer["RANK"] for answer in answers) == ["0", "1"]
    assert {(answer["WORLD_SIZE"], answer["LOCAL_WORLD_SIZE"]) for answer in answers} == {("2", "1")}


def test_a_node_that_does_not_come_is_missed_after_init_timeout(tmp_path):
    nodes = Nodes(2, f"127.0.0.1:{free_port()}", patience_s=1)
    with pytest.raises(UserError, match=r"the 2 nodes did not all meet at .* within comm\.init_timeout_s=1"):
        launch.start("tests.trainer.launching.launch_workers:answer", Config(), None, nodes)


# What is refused.


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        ({"nodes": 2}, r"cluster\.nodes=2 has no use with cluster=local"),
        ({"gpus_per_node": 2}, r"cluster\.gpus_per_node=2 has no use with cluster=local"),
        ({"job": "mine"}, r"cluster\.job=mine has no use with cluster=local"),
        ({"rdzv_endpoint": "a:1"}, r"cluster\.rdzv_endpoint=a:1 has no use with cluster=local"),
        ({"slurm": SlurmConfig()}, r"cluster\.slurm does not belong to cluster=local"),
        ({"name": ClusterKind.slurm}, r"cluster\.slurm does not belong to cluster=slurm"),
        ({"name": ClusterKind.torchrun, "nodes": 2}, r"cluster=torchrun needs the host:port of one of the nodes"),
        ({"name": ClusterKind.slurm, "slurm": SlurmConfig(), "job": "My job"}, r"cluster\.job=My job: use at most 42"),
    ],
)
def test_keys_without_a_use_are_refused(cluster, message):
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**cluster)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlurmConfig(minutes=2), r"signal_s=120 is no shorter than cluster\.slurm\.minutes=2"),
        (lambda: SlurmConfig(partition="a b"), r"cluster\.slurm\.partition='a b': use a name without spaces"),
        (lambda: SlurmConfig(memory_gb=0), r"memory_gb=0: use 1 or more"),
        (lambda: KubernetesConfig(restarts=3), r"cluster\.kubernetes\.restarts=3 has no use with kind=TrainJob"),
        (lambda: KubernetesConfig(mount="data"), r"mount=data: use an absolute path"),
    ],
)
def test_what_a_batch_system_is_asked_for_is_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train cluster=slurm", "hand one in with `twohop submit cluster=slurm"),
        ("submit", "cluster=local: there is nothing to hand a run to"),
        ("submit --multirun cluster=slurm", "for a sweep: twohop train --multirun"),
        ("submit cluster=kubernetes", "cluster.kubernetes.image is not set"),
        ("submit cluster=slurm cluster.gpus_per_node=1 launch.nproc=2", "gpus_per_node=1 is less than launch.nproc=2"),
        ("submit cluster=slurm cluster.nodes=3", "train.global_batch=16 is no multiple of"),
        ("submit cluster=slurm run.dir=old", "run.dir=old holds a run already"),
        ("train cluster.slurm.minutes=5", "cluster.slurm is null here"),
        ("train optimized_metric=beauty", "optimized_metric=beauty: unknown; use one of valid_loss"),
    ],
)
def test_commands_that_cannot_work_say_why(line, message, capfd):
    Path("old/checkpoints/step-1").mkdir(parents=True)
    assert cli.run(line.split()) == 2
    err = capfd.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# What batch systems read.


def submitted(capfd, *args: str) -> str:
    assert cli.run(["submit", *args, "dry_run=true", "out=job"]) == 0
    out, err = capfd.readouterr()
    assert (err, Path("job").read_text()) == ("", out)
    return out


def test_batch_script_is_clean_and_asks_for_what_was_wanted(capfd):
    script = submitted(
        capfd,
        *("cluster=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8", "launch.nproc=8", "cluster.job=mine"),
        *("cluster.slurm.partition=gpu", "cluster.slurm.memory_gb=64", "cluster.slurm.requeues=3"),
        *("cluster.slurm.setup=[module load cuda]", "data=text", "data.files=my book.txt", "train.global_batch=64"),
    )
    tool = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([tool, "--shell=bash", "job"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH --") and "=" in line]
    asked = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines)
    assert asked == {
        "job-name": "mine",
        "nodes": "2",
        "ntasks-per-node": "1",
        "cpus-per-task": "8",
        "gpus-per-node": "8",
        "mem": "64G",
        "time": "60",
        "partition": "gpu",
        "output": "runs/slurm-%j.log",
        "open-mode": "append",
        "signal": "B:USR1@120",
    }
    assert "\nmodule load cuda\n" in script
    assert "'data.files=my book.txt'" in script
    assert "dry_run" not in script
    assert 'run.dir=runs/pr_moe/slurm-"$SLURM_JOB_ID" resume=auto' in script


@pytest.mark.parametrize(
    ("restarts", "code", "requeued"), [("0", 75, True), ("2", 75, True), ("3", 75, False), ("0", 1, False)]
)
def test_batch_script_requeues_a_run_that_was_saved(restarts, code, requeued, capfd, tmp_path):
    """bash runs the script with stand-ins of SLURM's commands; the signal comes as SLURM sends it."""
    submitted(capfd, "cluster=slurm", "cluster.slurm.requeues=3")
    stand_ins = {
        "srun": f"trap 'kill $!; exit {code}' USR1\nsleep 60 &\nkill -USR1 $PPID\nwait\n",
        "scontrol": "echo called scontrol $*\n",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "a", "SLURM_RESTART_COUNT": restarts}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "job"], capture_output=True, text=True, env=environment, timeout=50, check=False)
    assert ran.returncode == code
    assert ("called scontrol requeue 5" in ran.stdout) == requeued


KUBERNETES = (
    *("cluster=kubernetes", "cluster.nodes=2", "cluster.gpus_per_node=4", "launch.nproc=4", "train.global_batch=32"),
    *("cluster.kubernetes.image=registry/twohop:1", "cluster.kubernetes.claim=shared", "cluster.kubernetes.cpus=16"),
)


def test_train_job_is_one_of_kubeflows_trainer(capfd):
    job = yaml.safe_load(submitted(capfd, *KUBERNETES, "cluster.kubernetes.memory_gb=64"))
    typed = TrainerV1alpha1TrainJob.from_dict(job)
    assert typed is not None
    assert typed.to_dict() == job  # a key or a type that the interface does not have is lost on the way
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert trainer["command"][:4] == ["torchrun", "-m", "twohop.trainer", "train"]
    assert trainer["command"][-2:] == ["run.dir=/data/runs/pr_moe/twohop", "resume=auto"]


class Answer:
    """What the client of Kubeflow reads, instead of an answer of a server."""

    def __init__(self, job: dict) -> None:
        self.data = json.dumps(job)


@pytest.mark.parametrize("nodes", [1, 2])
def test_pytorch_job_is_one_of_the_training_operator(nodes, capfd):
    job = yaml.safe_load(submitted(capfd, *KUBERNETES, f"cluster.nodes={nodes}", "cluster.kubernetes.kind=PyTorchJob"))
    client = ApiClient()
    typed = client.deserialize(Answer(job), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(typed) == job
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == dict(
        list({"Master": 1, "Worker": 1}.items())[:nodes]
    )


def test_manifest_is_handed_to_kubectl_as_it_is_shown(capfd, monkeypatch):
    shown = submitted(capfd, *KUBERNETES)
    given = []

    def run(program: list[str], **options: Any) -> subprocess.CompletedProcess:
        given.append((program, options["input"]))
        return subprocess.CompletedProcess(program, len(given) - 1, "created\n", "no such\nnamespace")

    monkeypatch.setattr("twohop.trainer.commands.submit.subprocess.run", run)
    assert cli.run(["submit", *KUBERNETES]) == 0
    assert given == [(["kubectl", "apply", "-f", "-"], shown)]
    assert capfd.readouterr().out == "created\n"
    assert cli.run(["submit", *KUBERNETES]) == 2
    assert "kubectl refuses the run: no such namespace" in capfd.readouterr().err


def test_image_is_clean():
    tool = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([tool, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
    ]
    shipped = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in shipped, name
