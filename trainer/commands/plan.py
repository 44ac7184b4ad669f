"""`twohop plan model=pr_moe_1.3b cluster.nodes=16`: memory, bytes and time of a training run, before it is paid for."""

from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.config.plan import PLANNED_ENGINES, PlanConfig


def main(args: list[str]) -> int:
    """Plan one run, or with --multirun one for each combination; return the exit code."""
    return run_app("plan", PlanConfig, args, plan)


def plan(config: PlanConfig, sweep_dir: Path | None) -> float:
    """Print the plan and return the predicted seconds of a step."""
    from twohop.trainer.plan.run import make_plan  # needs torch, which `--help` does not

    check(config)
    return make_plan(config)


def check(config: PlanConfig) -> None:
    """Raise a ConfigError for a name that there is not, and for ranks, batch and experts that do not divide."""
    from twohop.comm.routes import ROUTES
    from twohop.comm.wire import FORMATS
    from twohop.trainer.plan.hardware import GPUS
    from twohop.trainer.plan.search import layouts, micro_batches
    from twohop.trainer.validate.names import check_name

    check_name("cluster.gpu", config.cluster.gpu, GPUS)
    for key, known in (("engines", PLANNED_ENGINES), ("dispatchers", ROUTES), ("wires", FORMATS)):
        for name in getattr(config, key):
            check_name(key, name, known)
    micro_batches(config)
    layouts(config)
