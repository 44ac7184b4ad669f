"""A V-MoE trained on scanned digits: on any number of ranks alike, evaluated under capacities of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.launching.workers import evaluate, generate, train
from twohop.trainer.monitoring.metrics import read_metrics
from twohop.trainer.setup import set_up
from twohop.trainer.validate.groups import validate
from twohop.trainer.world import join_world

VIT = [
    "model.kind=vit",
    "model.vision.patch_size=4",
    "model.max_seq_len=256",
    "model.moe.router.name=noisy",
    "model.moe.router.jitter=0",
    "data.source=digits",
    "data.files=null",
    "train.seq_len=256",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 40 steps of 16 images, in this process."""
    directory = tmp_path_factory.mktemp("vision")
    size = ["train.steps=40", "train.global_batch=16", "train.micro_batch=8", "eval.batches=0"]
    config = tiny_config(directory, *VIT, *size, "model.moe.eval_capacity_factor=1.0")
    validate(config, world_size=1)
    train(config, None)
    return directory


def evaluated(directory: Path, *overrides: str) -> dict[str, Any]:
    stored = tiny_config(directory, *VIT, "train.micro_batch=8", "eval.batches=0", *overrides)
    validate(stored, world_size=1, training=False)
    return evaluate(stored, directory / "run")


def test_loss_and_gradient_norm_do_not_depend_on_the_world(tmp_path: Path) -> None:
    """Noise in the router, a capacity that drops, experts over EP 2 and 4."""
    few = [*VIT, "train.steps=4", "optim.lr=1e-3"]
    (reference, _), *_ = run_distributed(runs.curve, 1, tmp_path, few, init=False)
    for curve, _ in run_distributed(runs.curve, 4, tmp_path, [*few, "comm.ep_size=[2,4]"], init=False):
        for ours, theirs in zip(curve, reference, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_run_counts_images_and_writes_no_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert "sample" not in summary
    assert summary["targets"] == 40 * 16
    assert summary["valid_loss"] < summary["target_entropy"] < 2.31
    assert summary["valid_accuracy"] > 0.2  # chance is 0.1
    (last,) = [record for record in read_metrics(finished / "run") if record["kind"] == "eval"]
    assert last["valid_accuracy"] == summary["valid_accuracy"]
    assert "accuracy" in (finished / "run" / "report.html").read_text()
    again = evaluated(finished, "model.moe.eval_capacity_factor=1.0")
    assert again["valid_accuracy"] == summary["valid_accuracy"]
    assert f"nats per image, perplexity {again['valid_perplexity']:.2f}, accuracy " in capsys.readouterr().out


def test_how_tokens_are_dropped_may_differ_at_evaluation(finished: Path) -> None:
    full = evaluated(finished)
    starved = evaluated(finished, "model.moe.eval_capacity_factor=0.01", "model.moe.min_capacity=0")
    roomier = evaluated(finished, "model.moe.eval_capacity_factor=0.01", "model.moe.min_capacity=1000")
    quarter = ("model.moe.eval_capacity_factor=0.25", "model.moe.min_capacity=0")
    vanilla, by_priority = (evaluated(finished, *quarter, f"model.moe.batch_priority={how}") for how in ("none", "max"))
    rounded = evaluated(finished, *quarter, "model.moe.capacity_rounding=ceil4")
    assert roomier["valid_loss"] == pytest.approx(full["valid_loss"], rel=1e-6)
    assert len({found["valid_loss"] for found in (full, starved, vanilla, by_priority, rounded)}) == 5


@pytest.mark.parametrize(
    "key", ["model.moe.router.top_k=1", "model.moe.capacity_factor=0.5", "model.moe.router.noise=0.5"]
)
def test_what_a_model_has_learned_with_may_not_differ(finished: Path, key: str) -> None:
    config = tiny_config(finished, *VIT, key)
    with pytest.raises(CheckpointError, match=rf"was made with {key.split('=')[0]}="):
        evaluate(config, finished / "run")


def test_images_are_not_continued_as_text(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source=digits holds no text"):
        generate(tiny_config(finished, *VIT), finished / "run")


def test_sizes_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, *VIT, "model.vision.image_size=16")
    with pytest.raises(ConfigError, match=r"image_size=16 with channels=1 does not fit .*: they are 8×8 with 1 ch"):
        set_up(config, tmp_path, join_world(config.comm))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source=stdlib"], r"model.kind=vit cannot learn from data.source=stdlib: add data=digits"),
        (["model.kind=decoder", "model.vision=null"], r"model.kind=decoder cannot learn from .*: add model=vmoe"),
        (["train.seq_len=16"], r"train.seq_len=16 has no use with model.kind=vit"),
        (["data.files=a.txt"], r"data.files=\['a.txt'\] has no use with data=digits"),
        (["data.max_mib=1"], r"data.max_mib=1.0 has no use with data=digits"),
        (["data.tokenizer.kind=bpe"], r"data.tokenizer=.* has no use with data=digits"),
    ],
)
def test_what_does_not_go_with_images_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(tmp_path, *VIT, *overrides), world_size=1)


def test_a_router_by_token_id_is_refused(tmp_path: Path) -> None:
    hashed = ["model.moe.router.name=hash", "model.moe.router.top_k=1", "model.moe.router.z_loss=0"]
    with pytest.raises(ConfigError, match=r"router.name=hash: patches have no ids"):
        validate(tiny_config(tmp_path, *VIT, *hashed), world_size=1)
