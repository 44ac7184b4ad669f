"""Dynamic capacity and assignment caching in whole runs: the same on any world, and going on after an interruption."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config, write_corpus
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching.workers import train
from twohop.trainer.validate.groups import validate

# 29 samples, of which 24 make three global batches.
AGAIN = ["data.order=batches", "data.max_mib=0.0005", "eval.batches=1"]
CACHE = [
    *AGAIN, "model.moe.cache.enabled=true", "model.moe.cache.trigger=0.3", "model.moe.cache.check_every=5",
    "train.steps=24",
]  # fmt: skip
SCHEDULE = ["model.moe.capacity_policy=schedule", "model.moe.capacity_factor=null", "model.moe.capacity_margin=0.9"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dynamic")
    write_corpus(directory)
    return directory


def records(directory: Path, nproc: int, *overrides: str) -> list[list[dict[str, Any]]]:
    return run_distributed(runs.records, nproc, directory, overrides, init=False)


def same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for step, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our["loss"] == pytest.approx(their["loss"], rel=1e-5), f"step {step}"
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-5), f"step {step}"
        for name, layer in our["moe"].items():
            other = their["moe"][name]
            assert layer.keys() == other.keys()
            for key, value in layer.items():  # a token at a tie may turn
                assert value == pytest.approx(other[key], rel=0.02, abs=0.01), f"step {step}, {key}"


def test_cached_runs_are_the_same_on_any_world_and_skip_the_counts(directory: Path) -> None:
    (alone,) = records(directory, 1, *CACHE)
    shared = records(directory, 2, *CACHE, "comm.ep_size=2", "comm.ranks_per_node=1")
    assert [record["moe"] for record in shared[1]] == [record["moe"] for record in shared[0]]
    same(shared[0], alone)
    skipped = checked = 0
    for record in shared[0]:
        layers = list(record["moe"].values())
        phases = record["traffic"]["between nodes"]
        if all(layer.get("replayed") == 1 for layer in layers):
            assert not {"counts", "metadata", "metadata backward"} & set(phases)
            skipped += 1
        elif skipped:
            checked += any(layer["replayed"] == 0 and layer["repeated"] > 0.3 for layer in layers)
            assert "counts" in phases
    assert skipped > 4
    assert checked


def test_without_repeats_a_cache_changes_nothing(directory: Path) -> None:
    """The trigger is never passed: every bit is that of a run without a cache."""
    (live,) = records(directory, 1, *AGAIN, "train.steps=8")
    (idle,) = records(directory, 1, *CACHE, "model.moe.cache.trigger=1", "train.steps=8")
    for ours, theirs in zip(idle, live, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
        assert all(layer.get("replayed", 0) == 0 for layer in ours["moe"].values())


def test_a_scheduled_capacity_is_the_same_on_any_world_and_follows_each_layer(directory: Path) -> None:
    overrides = [*SCHEDULE, "train.steps=8"]
    (alone,) = records(directory, 1, *overrides)
    same(records(directory, 4, *overrides, "comm.ep_size=[2,4]")[0], alone)
    first, last = alone[0]["moe"], alone[-1]["moe"]
    assert all(layer["dropped"] == 0 for layer in first.values())
    assert any(layer["dropped"] > 0 for layer in last.values())
    factors = [layer["capacity"] for layer in last.values()]
    assert factors[0] != factors[1]
    for layer in last.values():
        assert layer["slots"] == pytest.approx(layer["capacity"] * 8 * 16 * 2)  # K = 2 of 8 sequences of 16 tokens


def test_a_dynamic_capacity_drops_nothing_and_allocates_no_more_than_it_needs(directory: Path) -> None:
    dynamic = ["model.moe.capacity_policy=dynamic", "model.moe.capacity_factor=null", "train.steps=4"]
    (found,) = records(directory, 1, *dynamic)
    (dropless,) = records(directory, 1, "model.moe.capacity_factor=null", "train.steps=4")
    same(found, dropless)
    for record in found:
        assert all(layer["dropped"] == 0 and layer["capacity"] >= 1 for layer in record["moe"].values())
    bounded = records(directory, 1, *dynamic, "model.moe.capacity_bound=1.25")[0]
    static = records(directory, 1, "train.steps=4")[0]
    for ours, theirs in zip(bounded, static, strict=True):
        assert ours["loss"] == theirs["loss"]
        for name, layer in ours["moe"].items():
            assert layer["slots"] <= theirs["moe"][name]["slots"]


def test_an_interrupted_schedule_goes_on_to_the_bit_and_a_cache_begins_anew(directory: Path) -> None:
    for overrides, exact in ((SCHEDULE, True), (CACHE, False)):
        folder = directory / f"interrupted-{exact}"
        settings = [*overrides, "train.steps=12", "checkpoint.every=6", f"run.dir={folder}"]
        whole = train(tiny_config(directory, *settings), None)
        shutil.rmtree(folder / "checkpoints" / "step-00000012")
        parts = train(tiny_config(directory, *settings, "resume=auto"), None)
        assert (parts["valid_loss"] == whole["valid_loss"]) or not exact
        assert parts["valid_loss"] == pytest.approx(whole["valid_loss"], rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe.cache.enabled=true"], "model.moe.cache.enabled=true: plans can only .* add data.order=batches"),
        (["data.order=batches", "train.global_batch=2000"], "samples of the training split make no batch of"),
    ],
)
def test_a_cache_and_an_order_that_cannot_work_are_refused(directory: Path, overrides: list[str], message: str) -> None:
    def begin() -> None:
        validate(tiny_config(directory, *overrides), 1)
        runs.start(directory, *overrides)

    with pytest.raises(ConfigError, match=message):
        begin()
