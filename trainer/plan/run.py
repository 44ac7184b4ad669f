"""From a configuration to a printed plan."""

import json
from dataclasses import replace
from pathlib import Path

from twohop.comm.cost import CostModel
from twohop.trainer.config import Recompute
from twohop.trainer.config.plan import PlanConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.plan.report import as_dict, show
from twohop.trainer.plan.search import replay, search
from twohop.trainer.plan.shape import model_shape
from twohop.trainer.plan.steptime import Timer


def make_plan(config: PlanConfig) -> float:
    """Find the best plan, print it, write it if asked to, and return the predicted seconds of a step.

    Raises ConfigError if nothing fits into memory, the model cannot be built, or the cost file cannot be read.
    """
    try:
        measured = CostModel.load(Path(config.cost_file).expanduser()) if config.cost_file else None
    except ValueError as error:
        raise ConfigError(f"cost_file: {error}") from None
    model = replace(config.model, vocab_size=config.model.vocab_size or config.vocab_size)
    try:
        timer = Timer(config, model_shape(model, *config.lengths), measured)
        timer.passes(config.engines[0], min(config.recompute, key=list(Recompute).index), timer.alone)
    except ValueError as error:  # there is no such model, or it asks for what its inputs do not say
        raise ConfigError(str(error)) from None
    found = search(timer)
    simulated = replay(timer, found.best)
    show(timer, found, simulated)
    if config.json:
        path = Path(config.json).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_dict(timer, found, simulated), indent=1) + "\n")
    return found.best.step_s
