"""`twohop plan model=pr_moe_1.3b cluster.nodes=16`: memory, bytes and time of a training run, before it is paid for."""

from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.config.plan import PLANNED_ENGINES, PlanConfig
from twohop.trainer.errors import ConfigError


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
    from twohop.trainer.plan.search import engines_refused, layouts, micro_batches
    from twohop.trainer.plan.steptime import UPDATE_BYTES
    from twohop.trainer.validate.names import check_name

    check_name("cluster.gpu", config.cluster.gpu, GPUS)
    check_name("optimizer", config.optimizer, UPDATE_BYTES)
    if config.fp8_experts and GPUS[config.cluster.gpu].fp8_flops is None:
        raise ConfigError(f"fp8_experts=true: cluster.gpu={config.cluster.gpu} has no fp8 products: leave it out")
    for key, known in (("engines", PLANNED_ENGINES), ("dispatchers", ROUTES), ("wires", FORMATS)):
        for name in getattr(config, key):
            check_name(key, name, known)
    refused = engines_refused(config)
    if len(refused) == len(config.engines):
        raise ConfigError(f"{refused[config.engines[0]]} goes with none of engines={config.engines}: add ddp")
    stacks = [config.model] if config.model.encoder is None else [config.model, config.model.encoder_stack]
    for moe in (stack.moe for stack in stacks):
        if moe.cache.enabled:
            raise ConfigError("model.moe.cache.enabled=true: what is kept of samples cannot be planned: leave it out")
        if moe.expert_bits is not None:
            raise ConfigError(f"model.moe.expert_bits={moe.expert_bits}: such experts are not trained: leave it out")
    micro_batches(config)
    layouts(config)
