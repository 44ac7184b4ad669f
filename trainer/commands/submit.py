"""`twohop submit cluster=slurm …`: hand a training run to a batch system, or show what would be handed in."""

import subprocess
from functools import partial
from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.clusters.kubernetes import manifest
from twohop.trainer.clusters.nodes import check_cluster
from twohop.trainer.clusters.sbatch import batch_script
from twohop.trainer.commands.train import for_hydra
from twohop.trainer.config import ClusterKind, Config, SubmitConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.run_folder import has_checkpoint

OWN_KEYS = ("dry_run", "out")  # the other arguments are for `twohop train`
# What writes the job, and the program that takes it from its standard input.
SYSTEMS = {
    ClusterKind.slurm: (batch_script, ["sbatch"]),
    ClusterKind.kubernetes: (manifest, ["kubectl", "apply", "-f", "-"]),
}


def main(args: list[str]) -> int:
    """Submit one run; return the exit code."""
    if {"-m", "--multirun"} & set(args):
        raise ConfigError("twohop submit hands in one run; for a sweep: twohop train --multirun cluster=slurm …")
    train_args = [arg for arg in args if arg.split("=", 1)[0].lstrip("+") not in OWN_KEYS]
    return run_app("submit", SubmitConfig, for_hydra(args), partial(submit, train_args))


def submit(args: list[str], config: SubmitConfig, sweep_dir: Path | None) -> None:
    """Write the job that runs `twohop train` with `args`, and hand it in unless `dry_run`."""
    from twohop.trainer.validate.groups import validate  # needs torch, which `--help` does not

    cluster = config.cluster
    if cluster.name not in SYSTEMS:
        raise ConfigError(
            f"cluster={cluster.name.value}: there is nothing to hand a run to; use cluster=slurm or kubernetes, "
            "or start `twohop train` on each machine"
        )
    check_cluster(cluster, config.launch.nproc)
    validate(config, config.launch.nproc * cluster.nodes)
    _check_folder(config)
    write, program = SYSTEMS[cluster.name]
    text = write(config, args)
    if config.out is not None:
        Path(config.out).write_text(text)
    if config.dry_run:
        print(text, end="")
        return
    if cluster.name is ClusterKind.slurm:
        Path(config.run.root).mkdir(parents=True, exist_ok=True)  # where its output goes: SLURM makes no folder
    try:
        answer = subprocess.run(program, input=text, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{program[0]} is not installed here: add dry_run=true to see what it would get") from None
    if answer.returncode:
        raise ConfigError(f"{program[0]} refuses the run: {' '.join(answer.stderr.split())}")
    print(answer.stdout, end="")


def _check_folder(config: Config) -> None:
    """A job goes on with the run in its folder, which after all it may have begun itself; not so when it is new."""
    if config.resume is None and config.run.dir is not None and has_checkpoint(Path(config.run.dir)):
        raise ConfigError(
            f"run.dir={config.run.dir} holds a run already: add resume=auto to continue it, or choose another"
        )
