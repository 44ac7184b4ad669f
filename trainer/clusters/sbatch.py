"""A batch script for SLURM: one task on each node, which starts the workers of its node."""

import os
import shlex
import sys
from collections.abc import Sequence

from twohop.trainer.config import Config

# srun runs in the background, because bash looks at signals only between two commands, or while it waits. SLURM tells
# the script alone that the time is nearly over, so that it knows why the run ends: a cancelled job is not to go on.
BODY = """\
set -uo pipefail
{setup}
echo "twohop: job $SLURM_JOB_ID, start $((${{SLURM_RESTART_COUNT:-0}} + 1)), on $SLURM_JOB_NODELIST"

time_is_over() {{
    kill -USR1 "$step"  # srun passes it on: the workers save a checkpoint and end
    wait "$step"
    code=$?
    if [ "$code" -eq {saved} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ]; then
        echo "twohop: job $SLURM_JOB_ID goes on from its checkpoint once it is started again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}}

srun --nodes={nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=0 \\
    {command} &
step=$!
trap time_is_over USR1
wait "$step"
"""


def batch_script(config: Config, args: Sequence[str]) -> str:
    """The script that runs `twohop train` with `args` on the nodes of `config.cluster`, and again after a time-out.

    The run folder is named by the job, which keeps its number when it is started again, unless `args` name one.
    """
    cluster, slurm = config.cluster, config.cluster.slurm
    assert slurm is not None
    options = {
        "job-name": cluster.job,
        "nodes": cluster.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus,
        "gpus-per-node": cluster.gpus_per_node,
        "mem": None if slurm.memory_gb is None else f"{slurm.memory_gb}G",
        "time": slurm.minutes,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "output": f"{config.run.root}/slurm-%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{slurm.signal_s}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    words = [shlex.quote(word) for word in (sys.executable, "-m", "twohop.trainer", "train", *args)]
    if config.resume is None:
        if config.run.dir is None:
            words.append(shlex.quote(f"run.dir={config.run.root}/{config.run.name}/slurm-") + '"$SLURM_JOB_ID"')
        words.append("resume=auto")
    body = BODY.format(
        setup="\n".join(slurm.setup),
        nodes=cluster.nodes,
        cpus=slurm.cpus,
        command=" ".join(words),
        saved=os.EX_TEMPFAIL,
        requeues=slurm.requeues,
    )
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", "", body])
