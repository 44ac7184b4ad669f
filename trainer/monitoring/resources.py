"""What a step took of the machine: time by phase, memory, traffic, and the part of the peak that was put to use."""

import resource
from typing import Any

import torch

from twohop.trainer.monitoring.accelerators import peak_flops
from twohop.trainer.monitoring.totals import add_traffic
from twohop.trainer.setup import Run
from twohop.trainer.world import gather_objects, world_size


def resources_of_world(run: Run, targets: int) -> dict[str, Any]:
    """What all ranks used since the last call. Every rank of the world must call this, at the end of a step.

    Seconds run from the last call to this one, so that this exchange counts in the next step. `phase_s` has the
    mean of the ranks for each phase, and together they are `step_s`; `phase_max_s` has the rank that was longest in
    the phase. `peak_memory` is the fullest rank's, in bytes (see `peak_memory`). `mfu` is the part of all ranks' peak
    that the model needed (see `training_flops`); None where peak or need are not known.
    """
    of_ranks = gather_objects((run.meter.snapshot(), run.clock.lap(), peak_memory(run.device)))
    traffic, phases, memory = zip(*of_ranks, strict=True)
    names = list(dict.fromkeys(name for seconds in phases for name in seconds))
    by_phase = {name: [seconds.get(name, 0.0) for seconds in phases] for name in names}
    mean = {name: sum(seconds) / len(seconds) for name, seconds in by_phase.items()}
    step_s = sum(mean.values())
    needed, peak = run.flops_per_target, peak_flops(run.config, run.device)
    return {
        "traffic": add_traffic(list(traffic)),
        "step_s": step_s,
        "phase_s": mean,
        "phase_max_s": {name: max(seconds) for name, seconds in by_phase.items()},
        "targets_per_s": targets / step_s,
        "mfu": needed and peak and needed * targets / step_s / (peak * world_size()),
        "peak_memory": max(memory),
    }


def peak_memory(device: torch.device) -> int:
    """The most memory so far, in bytes: allocated by torch on a GPU, resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
