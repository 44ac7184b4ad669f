"""The SLURM step (`srun`) that this process is a task of, and what its tasks are to a run.

A step with several tasks on some node: every task is a rank, as if torchrun had started it. A step with one task on
each node: every task starts `launch.nproc` workers on its node. A process that torchrun has started is a rank already,
wherever torchrun itself runs; so is one to which somebody has given RANK.
"""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import chain, repeat

from twohop.trainer.errors import ConfigError

LOOPBACK = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 20000, 10000  # below the ports that systems give out by themselves


@dataclass(frozen=True)
class Step:
    """A SLURM step as one of its tasks sees it."""

    tasks: tuple[int, ...]  # of each node
    node: int  # this task's, counted from 0
    local_task: int  # counted from 0 on its node
    first_host: str  # of node 0
    port: int  # another one for each step

    @classmethod
    def of(cls, environ: MutableMapping[str, str]) -> "Step | None":
        """The step that `environ` tells of; None outside of a step, such as in the script that sbatch runs."""
        if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
            return None
        tasks = _expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
        number = 100 * int(environ["SLURM_JOB_ID"]) + int(environ["SLURM_STEP_ID"])
        return cls(
            tasks,
            int(environ["SLURM_NODEID"]),
            int(environ["SLURM_LOCALID"]),
            LOOPBACK if len(tasks) == 1 else _first_host(environ["SLURM_STEP_NODELIST"]),
            int(environ.get("MASTER_PORT", FIRST_PORT + number % NUM_PORTS)),
        )

    @property
    def has_ranks(self) -> bool:
        """Whether its tasks are ranks; otherwise each of them starts workers on its node."""
        return max(self.tasks) > 1

    def rank_variables(self) -> dict[str, str]:
        """What torchrun would tell this task.

        Ranks are counted node by node, also where `srun --distribution=cyclic` deals out its own numbers otherwise:
        a topology takes neighbours for ranks of one node.
        """
        return {
            "RANK": str(sum(self.tasks[: self.node]) + self.local_task),
            "WORLD_SIZE": str(sum(self.tasks)),
            "LOCAL_RANK": str(self.local_task),
            "LOCAL_WORLD_SIZE": str(self.tasks[self.node]),
            "MASTER_ADDR": self.first_host,
            "MASTER_PORT": str(self.port),
        }


def adopt_step(environ: MutableMapping[str, str] = os.environ) -> None:
    """Make a task of a SLURM step that has ranks one of them, before anything asks who it is.

    Raises:
        ConfigError: the task sees fewer GPUs than there are tasks on its node.
    """
    step = Step.of(environ)
    if step is None or not step.has_ranks or "RANK" in environ:
        return
    own_tasks = step.tasks[step.node]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if "SLURM_GPUS_PER_TASK" in environ and visible and len(visible.split(",")) < own_tasks:
        raise ConfigError(
            f"srun --gpus-per-task={environ['SLURM_GPUS_PER_TASK']} shows a rank CUDA_VISIBLE_DEVICES={visible} alone, "
            f"and hides the GPUs of its neighbours: use --gpus-per-node={own_tasks}"
        )
    environ.update(step.rank_variables())


def _expand_tasks(counts: str) -> tuple[int, ...]:
    """Tasks of each node from SLURM's short form: 2(x3),1 means 2, 2, 2, 1."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
    return tuple(chain.from_iterable(repeat(int(tasks), int(nodes or 1)) for tasks, nodes in parts))


def _first_host(nodes: str) -> str:
    """The first name of SLURM's short form: gpu[07-09,12],login means gpu07, gpu08, …; scontrol is not everywhere."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
