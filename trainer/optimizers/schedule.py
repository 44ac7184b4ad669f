"""Learning rate over the run, as a fraction of its peak: warm-up, then cosine decay or warm-up–stable–decay."""

import math

from twohop.trainer.config import DecayShape, ScheduleConfig


def lr_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of `step` (counted from 0) ÷ its peak, in (0, 1].

    Linear warm-up reaches 1 in the last warm-up step. `cosine` (Loshchilov & Hutter 2017) then falls to
    `final_fraction` in the last step of the run; `wsd` (Hu et al., MiniCPM, 2024) stays at 1 and falls linearly
    during the last `decay_fraction` of the run. A pure function of the step: nothing to save, nothing to restore.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = total_steps - config.warmup_steps
    if config.shape is DecayShape.wsd:
        decay_steps = min(decay_steps, round(config.decay_fraction * total_steps))
    steps_left = total_steps - 1 - step
    if steps_left >= decay_steps:
        return 1.0
    progress = 1.0 - steps_left / decay_steps
    remaining = 1.0 - progress if config.shape is DecayShape.wsd else (1.0 + math.cos(math.pi * progress)) / 2
    return config.final_fraction + (1.0 - config.final_fraction) * remaining
