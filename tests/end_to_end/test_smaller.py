"""Pruned, merged and quantised runs: exported by any number of ranks, evaluated like any other run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import write_corpus
from twohop.models import init_weights
from twohop.models.compress import compress, gate_weights
from twohop.trainer.checkpoints.state import model_tensors
from twohop.trainer.config import Config, ExportConfig
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.launching import workers
from twohop.trainer.run_folder import read_config
from twohop.trainer.setup import set_up
from twohop.trainer.validate.groups import validate

WIDE = ("model.dim=32", "model.ffn_dim=64", "model.moe.capacity_factor=null", "train.steps=8")


def stored(folder: Path, schema: type[Config], **changes: Any) -> Any:
    merged = OmegaConf.merge(OmegaConf.structured(schema), read_config(folder), OmegaConf.create(changes))
    return OmegaConf.to_object(merged)


def export(folder: Path, **changes: Any) -> dict[str, Any]:
    return workers.export(stored(folder, ExportConfig, **changes), folder)


def evaluate(folder: Path, **changes: Any) -> dict[str, Any]:
    config = stored(folder, Config, **changes)
    validate(config, 1, training=False)
    return workers.evaluate(config, folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with layers of 4 and 8 experts."""
    directory = tmp_path_factory.mktemp("smaller")
    write_corpus(directory)
    runs.train_run(directory, WIDE)
    return directory / "run"


@pytest.fixture(scope="module")
def full(trained: Path) -> dict[str, Any]:
    return evaluate(trained)


@pytest.mark.parametrize("merge", [False, True])
def test_a_pruned_run_has_the_best_experts(trained: Path, full: dict[str, Any], tmp_path: Path, merge: bool) -> None:
    export(trained, format="pruned", out=str(tmp_path / "out"), experts=[2, 3], merge=merge)
    pruned = stored(tmp_path / "out", Config)
    assert pruned.model.moe.experts == [2, 3]
    assert evaluate(tmp_path / "out")["valid_loss"] == pytest.approx(full["valid_loss"], abs=0.2)

    run = set_up(stored(trained, Config), trained, torch.device("cpu"))
    init_weights(run.model, 0)
    workers._load_model(run)
    samples = run.data.valid
    with torch.no_grad(), gate_weights(run.model.eval()) as sums:
        for number in range(16):  # eval.batches=2 of 8 sequences
            run.model(**samples.batch([number]).inputs)
    smaller = set_up(pruned, tmp_path / "out", torch.device("cpu"))
    workers._load_model(smaller)
    found = model_tensors(smaller.model)
    for (name, _), keep in zip(run.model.moe_layers(), (2, 3), strict=True):
        prefix = f"model.{name}."
        before = {key.removeprefix(prefix): x for key, x in model_tensors(run.model).items() if key.startswith(prefix)}
        for part, tensor in compress(before, sums[name], keep, merge).items():
            torch.testing.assert_close(found[prefix + part], tensor, msg=part)


def test_as_many_experts_as_before_is_the_same_model(trained: Path, full: dict[str, Any], tmp_path: Path) -> None:
    export(trained, format="pruned", out=str(tmp_path / "out"), experts=[4, 8])
    assert evaluate(tmp_path / "out") == full


@pytest.mark.parametrize(
    "changes", [{"format": "pruned", "experts": [2, 4], "merge": True}, {"format": "quantized", "bits": 4}]
)
def test_exports_do_not_depend_on_the_world(trained: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # 18 samples in 3 micro-batches over 2 ranks: one of these repeats a sample that must not count.
    uneven = {"train": {"micro_batch": 6, "global_batch": 6}, "eval": {"batches": 3}}
    export(trained, out=str(one), **changes, **uneven)
    shared = {**changes, **uneven, "comm": {"ep_size": [2, 2]}}
    run_distributed(_export, 2, trained, str(two), shared, init=False, timeout=120)
    assert stored(two, Config).comm.ep_size == []
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-5, atol=1e-8, msg=name)
    expected = evaluate(one)
    for found in run_distributed(evaluate, 2, two, init=False, timeout=120):
        assert found == pytest.approx(expected, rel=1e-6)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    run = set_up(stored(folder, Config), folder, torch.device("cpu"))
    workers._load_model(run)
    return model_tensors(run.model)


def _export(folder: Path, out: str, changes: dict[str, Any]) -> None:
    export(folder, out=out, **changes)


@pytest.mark.parametrize("bits", [8, 4])
def test_exported_in_fewer_bits_is_evaluated_in_fewer_bits(
    trained: Path, full: dict[str, Any], tmp_path: Path, bits: int
) -> None:
    written = export(trained, format="quantized", out=str(tmp_path / "out"), bits=bits)
    there = evaluate(tmp_path / "out")
    assert there == evaluate(trained, eval={"expert_bits": bits})
    assert there["valid_loss"] != full["valid_loss"]
    assert there["valid_loss"] == pytest.approx(full["valid_loss"], rel={8: 1e-3, 4: 1e-2}[bits])
    config = stored(tmp_path / "out", Config)
    assert config.model.moe.expert_bits == bits
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("checkpoints/*/*.distcp"))
    assert written["bytes"] < size < 1.5 * written["bytes"]
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_bits=.: experts of few bits have no gradients"):
        validate(config, 1)
    with pytest.raises(ConfigError, match=f"the experts have {bits} bits already"):
        export(tmp_path / "out", format="quantized", out=str(tmp_path / "again"))


def test_text_comes_out_of_a_smaller_run(trained: Path, tmp_path: Path) -> None:
    export(trained, format="quantized", out=str(tmp_path / "out"))
    config = stored(tmp_path / "out", Config, generate={"max_new_tokens": 3, "prompt": "to"})
    assert workers.generate(config, tmp_path / "out")["text"].startswith("to")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"format": "pruned", "experts": [2]}, CheckpointError, "holds something already"),
        ({"format": "pruned", "experts": [2, 9]}, ConfigError, r"experts=\[2, 9\]: the layers have \[4, 8\]"),
        ({"format": "pruned", "experts": [2, 2, 2]}, ConfigError, r"the layers have \[4, 8\]; say for each"),
        ({"format": "pruned", "experts": [1, 1]}, ConfigError, r"top_k=2 is more than the 1 experts"),
        ({"format": "pruned"}, ValueError, "experts is not set"),
        ({"format": "pruned", "experts": ["a"]}, ValueError, r"experts=\['a'\]: use a number"),
        ({"format": "quantized", "bits": 3}, ValueError, "bits=3: use 8 or 4"),
        ({"format": "hf", "bits": 4}, ValueError, "bits=4 has no use with format=hf: add format=quantized"),
        ({"format": "hf", "experts": 2}, ValueError, r"experts=\[2\] has no use with format=hf"),
        ({"format": "quantized", "merge": True}, ValueError, "merge=True has no use with format=quantized"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    trained: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        export(trained, out=str(tmp_path), **changes)


def test_narrow_experts_have_no_four_bits(tmp_path: Path) -> None:
    runs.train_run(tmp_path, ["train.steps=1"])  # 16 wide
    with pytest.raises(ConfigError, match="the experts are 16 and 32 wide: use 8 bits"):
        export(tmp_path / "run", format="quantized", bits=4, out=str(tmp_path / "out"))
