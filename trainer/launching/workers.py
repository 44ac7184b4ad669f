"""What a worker process does for a command, from joining the world to leaving it. `launching.launch` calls these.

Every rank calls the function with the same configuration. `directory` is the run folder; None under an outer
launcher, where rank 0 decides it for all.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from twohop.models.quantize import quantize_experts
from twohop.trainer.checkpoints.checkpoint import load_tensors
from twohop.trainer.config import Config, ExportConfig
from twohop.trainer.engines.deepspeed_config import write_deepspeed_config
from twohop.trainer.errors import CheckpointError, Interrupted, UserError
from twohop.trainer.evaluate import Evaluation
from twohop.trainer.evaluate import evaluate as evaluate_model
from twohop.trainer.exporters import EXPORTERS
from twohop.trainer.generate import generate_text, sample_text
from twohop.trainer.initial import start_weights
from twohop.trainer.loop import train as train_model
from twohop.trainer.monitoring.metrics import MetricsWriter, read_metrics, write_summary
from twohop.trainer.monitoring.progress import Progress
from twohop.trainer.monitoring.totals import add_pairs, add_traffic
from twohop.trainer.reports.plots import format_bytes
from twohop.trainer.reports.report import write_report
from twohop.trainer.run_folder import open_run, write_config
from twohop.trainer.setup import Run, set_up, weights_identity
from twohop.trainer.trackers import build_trackers
from twohop.trainer.world import gather_objects, join_world, leave_world, rank, say, world_size


def train(config: Config, directory: Path | None) -> dict[str, Any]:
    """Train, evaluate, sample and report. Returns the summary, the same on every rank."""
    with _world(config) as device:
        run = set_up(config, _open_run(config, directory), device)
        first_step, tracker_id = _restore(run) if config.resume else _start_fresh(run)
        if rank() == 0:
            write_config(run.directory, config)
            write_deepspeed_config(run.directory, config, world_size())
        say(run.describe())
        writer = _open_metrics(run, first_step, tracker_id) if rank() == 0 else None
        with writer or nullcontext():
            with Progress(config.train.steps, rank() == 0, first_step, unit=run.data.unit) as progress:
                valid = train_model(run, first_step, tracker_id, writer, progress)
                progress.print("")
            sample = sample_text(run)
            summary = {}
            if writer is not None:
                summary = _summary(run, valid, sample)
                write_summary(run.directory, summary)
                writer.close(summary)
        if rank() == 0:
            _tell(run, summary, write_report(run.directory))
        return gather_objects(summary)[0]  # rank 0 may be on any node, and a sweep's answer comes from the first


def evaluate(config: Config, directory: Path) -> dict[str, Any]:
    """Validation loss and accuracy of a run's newest checkpoint, printed by rank 0."""
    with _world(config) as device:
        run = set_up(config, directory, device)
        step = _load_model(run)
        if config.eval.expert_bits is not None:
            quantize_experts(run.model, config.eval.expert_bits)
        record = evaluate_model(run).record()
        say(f"step {step}: validation loss {_in_words(record, run.data.unit)}")
        return {"step": step, **record}


def generate(config: Config, directory: Path) -> dict[str, Any]:
    """Text from a run's newest checkpoint, printed by rank 0."""
    with _world(config) as device:
        run = set_up(config, directory, device)
        _load_model(run)
        text = generate_text(run, config.generate)
        say(text)
        return {"text": text}


def export(config: ExportConfig, directory: Path) -> dict[str, Any]:
    """The model of a run's newest checkpoint in the form `config.format`."""
    with _world(config) as device:
        run = set_up(config, directory, device)
        _load_model(run)
        return EXPORTERS[config.format](run, config)


@contextmanager
def _world(config: Config) -> Iterator[Any]:
    """This rank's device, inside the world. After an error nothing is torn down: peers see at once that it ended."""
    device = join_world(config.comm)
    interrupted = None
    try:
        yield device
    except Interrupted as stop:  # of all ranks, after the same step
        interrupted = stop
    gather_objects(None)  # whoever leaves early closes connections that others may still read
    leave_world()
    if interrupted is not None:
        raise interrupted


def _open_run(config: Config, directory: Path | None) -> Path:
    """The run folder, decided by rank 0 if nobody has; sets `config.resume` as `open_run` does."""
    if directory is not None:
        return directory
    error = None
    if rank() == 0:
        try:
            directory = open_run(config)
        except UserError as refused:
            error = refused
    directory, config.resume, error = gather_objects((directory, config.resume, error))[0]
    if error is not None:
        raise error
    assert directory is not None
    return directory


def _start_fresh(run: Run) -> tuple[int, str]:
    start_weights(run)
    return 0, gather_objects(uuid.uuid4().hex[:8])[0]


def _restore(run: Run) -> tuple[int, str]:
    """Continue from the newest whole checkpoint: its step and the tracker's run id."""
    checkpoint = run.checkpoints.latest()
    if checkpoint is None:
        raise CheckpointError(f"resume={run.config.resume}: {run.checkpoints.directory} holds no checkpoint")
    state = run.state()
    load_tensors(checkpoint, state, run.identity())
    run.engine.restored(state)
    say(f"continuing from step {checkpoint.step} ({checkpoint.path})")
    return checkpoint.step, checkpoint.tracker_id


def _load_model(run: Run) -> int:
    """Fill the model alone from the newest whole checkpoint; returns its step."""
    checkpoint = run.checkpoints.latest()
    if checkpoint is None:
        raise CheckpointError(f"run={run.directory}: {run.checkpoints.directory} holds no checkpoint; train it first")
    load_tensors(checkpoint, run.engine.model_state(), weights_identity(run.config))
    return checkpoint.step


def _open_metrics(run: Run, first_step: int, tracker_id: str) -> MetricsWriter:
    plain = OmegaConf.to_container(OmegaConf.structured(run.config), enum_to_str=True)
    trackers = build_trackers(run.config.tracker, run.directory, tracker_id, cast(dict[str, Any], plain))
    return MetricsWriter(run.directory, trackers, first_step if run.config.resume else None)


def _in_words(record: dict[str, Any], unit: str) -> str:
    """An evaluation on one line."""
    loss, perplexity, accuracy = (record[f"valid_{name}"] for name in ("loss", "perplexity", "accuracy"))
    depth = f", {record['valid_depth']:.2f} blocks deep" if "valid_depth" in record else ""
    return f"{loss:.4f} nats per {unit}, perplexity {perplexity:.2f}, accuracy {accuracy:.1%}{depth}"


def _summary(run: Run, valid: Evaluation, sample: str | None) -> dict[str, Any]:
    """summary.json: where the whole run has come to, also over interruptions."""
    steps = [record for record in read_metrics(run.directory) if record["kind"] == "train"]
    traffic = add_traffic([record["traffic"] for record in steps])
    return {
        "steps": run.config.train.steps,
        "targets": sum(record["targets"] for record in steps),
        "train_loss": steps[-1]["loss"],
        **valid.record(),
        "target_entropy": run.data.valid.target_entropy(),
        "training_seconds": sum(record["step_s"] for record in steps),
        "traffic": {level: add_pairs(phases.values()) for level, phases in traffic.items()},
        **({} if sample is None else {"sample": sample}),
    }


def _tell(run: Run, summary: dict[str, Any], report: Path) -> None:
    """The end of a run, on rank 0's terminal."""
    lines = [
        f"validation loss   {_in_words(summary, run.data.unit)}",
        f"for comparison    {summary['target_entropy']:.4f} nats: the entropy of the targets, without any context",
    ]
    for level, (sent_bytes, messages) in summary["traffic"].items():
        lines.append(f"{level:<18}{format_bytes(sent_bytes)} in {messages:,} messages for experts")
    sample = summary.get("sample", "").splitlines()
    lines += [f"sample            {line}" for line in sample[:1]]
    lines += [f"                  {line}" for line in sample[1:]]
    lines += [f"run folder        {run.directory}", f"report            {report}"]
    say("\n".join(lines))
