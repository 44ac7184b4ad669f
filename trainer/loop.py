"""The training loop.

A step takes `global_batch` sequences, cut into micro-batches whose content depends on the seed and the step alone.
Rank r of W takes the micro-batches r, r + W, …; the loss is a sum over all of them divided by the global number of
targets, and gradients are summed over ranks. So a step means the same on any number of ranks.

"""

import hashlib
import math
from contextlib import closing
from typing import Any

import torch

from twohop.comm import NotFiniteError
from twohop.comm.diagnose import announce_failure
from twohop.models.layer_drop import drop_layers
from twohop.trainer.checkpoints.saver import Saver
from twohop.trainer.errors import Interrupted, UserError
from twohop.trainer.evaluate import Evaluation, evaluate
from twohop.trainer.faults import recording_faults
from twohop.trainer.interruption import noting_stop_signals
from twohop.trainer.monitoring.metrics import MetricsWriter
from twohop.trainer.monitoring.profile import profiling
from twohop.trainer.monitoring.progress import Progress
from twohop.trainer.monitoring.resources import resources_of_world
from twohop.trainer.monitoring.totals import StepTotals
from twohop.trainer.optimizers.schedule import lr_factor
from twohop.trainer.setup import Run


def train(run: Run, first_step: int, tracker_id: str, writer: MetricsWriter | None, progress: Progress) -> Evaluation:
    """Train from `first_step` to the end, with evaluations and checkpoints on the way and at the end.

    Every rank must call this; rank 0 alone has a `writer`. Returns the last evaluation.

    Raises:
        UserError: loss or gradient became infinite or NaN.
        CheckpointError: a checkpoint cannot be written.
        CommError: a rank died or did not answer within comm.timeout_s.
        Interrupted: a signal told some rank to stop; a checkpoint is written.
    """
    config, steps = run.config, run.config.train.steps
    valid, saver = None, Saver(run, tracker_id)
    with (
        recording_faults(run),
        profiling(run, first_step) as profile_step,
        noting_stop_signals() as stop,
        closing(run.loader),
    ):
        for step in range(first_step, steps):
            done = step + 1
            with announce_failure(run.topology, f"step {done}"):  # so that ranks that wait for this one hear of it
                record = train_step(run, step)
            profile_step()
            progress.update(done, record["loss"], record["targets_per_s"])
            if writer is not None:
                writer.log(done, record)
            if (moved := run.placement.after_step(done)) is not None and writer is not None:
                writer.log(done, moved, kind="placement")
            if _is_due(done, config.eval.every, steps):
                valid = evaluate(run)
                if writer is not None:
                    writer.log(done, valid.record(), kind="eval")
            saver.check()
            stopped_by = stop.agreed(run.device)
            if stopped_by or _is_due(done, config.checkpoint.every, steps):
                saver.save(done)
            if stopped_by:
                saver.finish()
                raise Interrupted(
                    f"stopped by {stopped_by.name} after step {done}, which is saved; resume=auto goes on"
                )
        saver.finish()
    return valid or evaluate(run)  # a run that was already at its end


def train_step(run: Run, step: int) -> dict[str, Any]:
    """One step of the whole world; returns its record for metrics.jsonl, the same on all ranks."""
    with run.clock.running(f"step {step + 1}"):
        totals, global_targets = _accumulate(run, step)
        factor = lr_factor(step, run.config.train.steps, run.config.schedule)
        with run.clock.phase("optimizer"):
            grad_norm = run.engine.step(factor)
        record = totals.reduce(global_targets)
        if not math.isfinite(record["loss"] + grad_norm):
            raise _diverged(run, step, f"the loss is {record['loss']} and the gradient norm {grad_norm}")
        for (_, layer), total in zip(run.model.moe_layers(), totals.layers(), strict=True):
            layer.after_step(total, totals.micro_batches)
        record |= {"lr": run.config.optim.lr * factor, "grad_norm": grad_norm, "targets": global_targets}
        return record | resources_of_world(run, global_targets)


def _accumulate(run: Run, step: int) -> tuple[StepTotals, int]:
    """Gradients of this rank's micro-batches; returns what they measured, and the targets of the global batch."""
    config = run.config
    with run.clock.phase("data"):
        data = run.loader.step(step)
    run.model.train()
    drop_layers(run.model, config.seed, step)
    run.meter.reset()
    totals = StepTotals([name for name, _ in run.model.moe_layers()])
    for micro in data.micro_batches:
        seed_noise(config.seed, micro.number)
        with run.clock.phase("data"):
            batch = micro.load().to(run.device)
        try:
            with run.clock.phase("forward"), run.engine.autocast():
                output = run.model(**batch.inputs)
                parts = run.objective(batch, output, micro.targets, step / config.train.steps)
                moe_stats = output.moe
                del output  # backward does without the logits, which may be the largest tensor that there is
        except NotFiniteError as error:
            raise _diverged(run, step, str(error)) from None
        last = micro is data.micro_batches[-1]
        with run.clock.phase("backward"):
            run.engine.backward(torch.stack(list(parts.values())).sum() / data.targets, last)
        totals.add(parts, moe_stats)
    return totals, data.targets


def _diverged(run: Run, step: int, what: str) -> UserError:
    optim, schedule = run.config.optim, run.config.schedule
    return UserError(
        f"step {step + 1}: {what.rstrip('.')}: lower optim.lr={optim.lr}, "
        f"or raise schedule.warmup_steps={schedule.warmup_steps}"
    )


def _is_due(done: int, every: int, total: int) -> bool:
    return done == total or (every > 0 and done % every == 0)


def seed_noise(seed: int, number: int) -> None:
    """Seed torch for one micro-batch, so that random noise depends neither on the world size nor on interruptions."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
