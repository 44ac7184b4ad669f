"""What engines have in common besides the steps themselves: checkpoints, and models that are built in other ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import ENGINES, tiny_config, tiny_overrides, write_corpus
from twohop.models import init_weights
from twohop.trainer.cli import run as twohop
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching import workers
from twohop.trainer.loop import train_step
from twohop.trainer.monitoring.metrics import read_metrics
from twohop.trainer.setup import set_up
from twohop.trainer.validate.groups import validate

CHAIN = ("ddp", "zero-2", "fsdp", "zero-1", "zero-2", "zero-0", "fsdp", "ddp")  # each step by another engine


def one_step_each(directory: Path) -> list[dict[str, Any]]:
    """The records of a training in which every engine takes one step and hands over by a checkpoint."""
    records = []
    for step, engine in enumerate(CHAIN):
        config = tiny_config(directory, *ENGINES[engine], "comm.ep_size=[2,1]")
        run = set_up(config, directory / "run", torch.device("cpu"))
        if step:
            assert workers._restore(run)[0] == step
        else:
            init_weights(run.model, config.seed)
        records.append(train_step(run, step))
        run.checkpoints.save(step + 1, run.state(), run.identity(), "")
    return records


def test_every_engine_goes_on_where_another_stopped(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    (expected, _), *_ = run_distributed(runs.curve, 1, tmp_path, (), init=False)
    for records in run_distributed(one_step_each, 2, tmp_path, timeout=180):
        for step, (record, theirs) in enumerate(zip(records, expected, strict=False)):
            ours = record["loss"], record["grad_norm"]
            assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}, by {CHAIN[step]}"


def test_the_command_trains_by_deepspeed_and_leaves_its_configuration(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    arguments = [*tiny_overrides(tmp_path), "engine=deepspeed", "engine.zero_stage=2", "launch.nproc=2"]
    assert twohop(["train", *arguments, "train.steps=2"]) == 0
    written = json.loads((tmp_path / "run" / "ds_config.json").read_text())
    assert written["zero_optimization"]["stage"] == 2
    assert written["gradient_accumulation_steps"] == 2  # 8 sequences a step, 2 a micro-batch, 2 ranks
    assert (written["gradient_allreduce_op"], written["gradient_clipping"]) == ("sum", 0.0)
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optim.name=muon",), r"optim\.name=muon: engine\.zero_stage=2 .*use optim\.name=adamw"),
        (
            ("model.moe.cache.enabled=true", "data.order=batches"),
            r"engine\.zero_stage=2 sums .*use .*zero_stage=1",
        ),
    ],
)
def test_what_zero_2_cannot_do_is_refused(tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(tmp_path, *ENGINES["zero-2"], *overrides), 2)


def test_without_deepspeed_its_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twohop.trainer.validate.groups.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="DeepSpeed is not installed; `pip install deepspeed`, or use engine=fsdp"):
        validate(tiny_config(tmp_path, *ENGINES["zero-1"]), 1)
