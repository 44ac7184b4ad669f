"""The studies on text: every variant is a run that can start, and tables say what metrics.jsonl and summaries hold."""

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from tests.scripts.test_reproduce import common, load
from twohop.models import parameter_counts
from twohop.trainer import cli
from twohop.trainer.config import Config
from twohop.trainer.monitoring.metrics import MetricsWriter
from twohop.trainer.run_folder import write_config

STUDIES = ("dense_vs_moe", "placement", "residual", "pr_moe", "balance")


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """The configurations that would have been trained."""
    monkeypatch.chdir(tmp_path)
    seen: list[Config] = []
    module = importlib.import_module("twohop.trainer.commands.train")
    monkeypatch.setattr(module, "start", lambda _, config, *where: seen.append(config) or {})
    return seen


def compose(study: str, composed: list[Config]) -> dict[str, Config]:
    variants = load(study).VARIANTS
    for overrides in variants.values():
        assert cli.run(["train", *common.SMALL_LM, *overrides]) == 0
    return dict(zip(variants, composed, strict=True))


@pytest.mark.parametrize("study", STUDIES)
def test_variants_can_start(study: str, composed: list[Config]) -> None:
    configs = compose(study, composed)
    assert len(configs) >= 2
    assert len({str(config) for config in configs.values()}) == len(configs)


def test_dense_and_experts_have_equal_compute(composed: list[Config]) -> None:
    """All but `gates`, which are 64 x 8 in each of 4 layers."""
    active = {name: parameter_counts(c.model).active for name, c in compose("dense_vs_moe", composed).items()}
    assert {count - active["dense"] for name, count in active.items() if name != "dense"} == {4 * 64 * 8}


def test_both_placements_have_the_same_parameters(composed: list[Config]) -> None:
    first, second = (parameter_counts(config.model) for config in compose("placement", composed).values())
    assert first == second


def test_residual_and_two_experts_have_equal_compute(composed: list[Config]) -> None:
    two, one = (parameter_counts(config.model).active for config in compose("residual", composed).values())
    assert two == one


def make_run(folder: Path, name: str, seed: int, records: list[dict[str, Any]], **summary: float) -> Any:
    (folder / f"{name}-{seed}").mkdir(parents=True)
    write_config(folder / f"{name}-{seed}", Config())
    with MetricsWriter(folder / f"{name}-{seed}") as writer:
        for step, record in enumerate(records, start=1):
            writer.log(step, record)
    return common.Trained(name, seed, folder / f"{name}-{seed}", summary)


def test_violation_is_of_the_last_fifth_of_steps_over_all_layers(tmp_path: Path) -> None:
    idle = {"moe": {"a": {"load": [1.0, 0, 0, 0]}, "b": {"load": [1.0, 0]}}}
    last = {"moe": {"a": {"load": [0.5, 0.25, 0.25, 0]}, "b": {"load": [0.75, 0.25]}}}
    run = make_run(tmp_path, "run", 0, [idle] * 8 + [last] * 2)
    assert load("balance").violation(run) == pytest.approx(((4 * 0.5 - 1) + (2 * 0.75 - 1)) / 2)


def test_losses_are_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "parameter_counts", lambda model: (2_000_000, 1_500_000))
    losses = {"first": (2.0, 3.0), "second": (1.9, 2.8)}
    trained = {
        name: [make_run(tmp_path, name, seed, [], valid_loss=loss) for seed, loss in enumerate(both)]
        for name, both in losses.items()
    }
    lines = common.loss_table(trained, more=["x", "y"]).splitlines()
    assert lines[2] == "| first | 2.00 M | 1.50 M | 2.5000 ± 0.7071 |  | x |"
    assert lines[3] == "| second | 2.00 M | 1.50 M | 2.3500 ± 0.6364 | -0.1500 ± 0.0707 | y |"


def test_bytes_are_those_of_dispatch_for_each_token_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    residual = load("residual")
    traffic = {"between nodes": {"dispatch": [1000, 3], "combine": [7, 1]}}
    record = {"targets": 5, "moe": {"a": {}, "b": {}}, "traffic": traffic}
    run, asked = make_run(tmp_path, "run", 0, [record, record]), []
    monkeypatch.setattr(
        residual, "train", lambda options, name, *overrides: asked.append((options, overrides)) or [run]
    )
    assert residual.bytes_per_token(Namespace(seeds=3), "top2", 4) == (run, 2 * 1000 / (2 * 5 * 2))
    options, overrides = asked[0]
    assert options.seeds == 1
    assert "model.moe.experts=4" in overrides
