"""`twohop plan model=pr_moe_1.3b cluster.nodes=16`: memory, bytes and time of a training run, before it is paid for."""

import json
from dataclasses import replace
from pathlib import Path

from twohop.trainer.app import run_app
from twohop.trainer.config.plan import PLANNED_ENGINES, PlanConfig
from twohop.trainer.errors import ConfigError


def main(args: list[str]) -> int:
    """Plan one run, or with --multirun one for each combination; return the exit code."""
    return run_app("plan", PlanConfig, args, plan)


def plan(config: PlanConfig, sweep_dir: Path | None) -> float:
    """Print the plan and return the predicted seconds of a step."""
    from twohop.comm.cost import CostModel
    from twohop.comm.routes import ROUTES
    from twohop.comm.wire import FORMATS
    from twohop.trainer.plan.hardware import GPUS
    from twohop.trainer.plan.report import as_dict, show
    from twohop.trainer.plan.search import layouts, micro_batches, replay, search
    from twohop.trainer.plan.shape import model_shape
    from twohop.trainer.plan.steptime import Timer
    from twohop.trainer.validate import check_name

    check_name("cluster.gpu", config.cluster.gpu, GPUS)
    for key, known in (("engines", PLANNED_ENGINES), ("dispatchers", ROUTES), ("wires", FORMATS)):
        for name in getattr(config, key):
            check_name(key, name, known)
    try:
        measured = CostModel.load(Path(config.cost_file).expanduser()) if config.cost_file else None
    except ValueError as error:
        raise ConfigError(f"cost_file: {error}") from None
    micro_batches(config), layouts(config)  # what cannot be is refused before the work begins
    model = replace(config.model, vocab_size=config.model.vocab_size or config.vocab_size)
    timer = Timer(config, model_shape(model, config.seq_len or model.max_seq_len, config.precision), measured)
    found = search(timer)
    simulated = replay(timer, found.best)
    show(timer, found, simulated)
    if config.json:
        path = Path(config.json).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_dict(timer, found, simulated), indent=1) + "\n")
    return found.best.step_s
