"""Pairs of several tasks from one text, and a model that trains on them, is evaluated by task and taken apart."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from tests.distributed import run_distributed
from tests.tiny import write_corpus
from twohop.models import init_weights
from twohop.trainer.config import Config, DataConfig, ExportConfig, MultitaskConfig, TokenizerConfig, TokenizerKind
from twohop.trainer.data import IGNORED
from twohop.trainer.data.multitask import TASKS, TaskPairs, build_task_data, encode_source, spread
from twohop.trainer.data.tokenizer import ByteTokenizer
from twohop.trainer.errors import CheckpointError, ConfigError, DataError
from twohop.trainer.evaluate import evaluate
from twohop.trainer.exporters.task import load_task
from twohop.trainer.generate import generate_text
from twohop.trainer.launching import workers
from twohop.trainer.loop import train_step
from twohop.trainer.setup import Run, set_up
from twohop.trainer.validate.groups import validate
from twohop.trainer.world import join_world

LINE = "The quick brown Fox is by string"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("copy", "The quick brown Fox is by string"),
        ("swapcase", "tHE QUICK BROWN fOX IS BY STRING"),
        ("rot13", "Gur dhvpx oebja Sbk vf ol fgevat"),
        ("no_vowels", "Th qck brwn Fx s by strng"),
        ("pig_latin", "eThay uickqay ownbray oxFay isway byway ingstray"),
        ("mirror", "ehT kciuq nworb xoF si yb gnirts"),
        ("reverse_words", "string by is Fox brown quick The"),
        ("sort_words", "Fox The brown by is quick string"),
    ],
)
def test_what_a_task_makes_of_a_line(task: str, expected: str):
    assert TASKS[task](LINE) == expected


def test_every_task_has_an_example_above():
    marks = test_what_a_task_makes_of_a_line.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(TASKS)


# Pairs


def data_config(directory: Path, **options: Any) -> DataConfig:
    settings = MultitaskConfig(**{"tasks": ["copy", "rot13"], **options})
    path = directory / "corpus.txt"
    return DataConfig(
        source="multitask", files=[str(path if path.exists() else write_corpus(directory))], multitask=settings
    )


def texts(pairs: TaskPairs, number: int) -> tuple[int, str, str]:
    """Task, source and target of a sample, as text."""
    pair = pairs.pair_of_sample[number]
    task, *source = pairs.sources[pair].tolist()
    *target, end = pairs.targets[pair].tolist()
    assert end == 256
    return task - 257, bytes(source).decode(), bytes(target).decode()


def test_pairs_hold_what_their_task_makes_of_lines_of_the_text(tmp_path: Path):
    config = data_config(tmp_path)
    data = build_task_data(config, 64)
    lines = set((tmp_path / "corpus.txt").read_text().splitlines())
    train, valid = ([texts(split, n) for n in range(len(split))] for split in (data.train, data.valid))
    for task, source, target in train + valid:
        assert target == TASKS[["copy", "rot13"][task]](source)
    whole_lines = [source in lines for _, source, _ in train + valid]
    assert sum(whole_lines) >= len(whole_lines) - 4  # where the file is cut, half a line may be left on either side
    assert not {source for _, source, _ in train} & {source for _, source, _ in valid}
    assert data.vocab_size == 257 + 2
    assert len(data.train) > 600


def test_a_line_of_both_splits_is_left_to_validation(tmp_path: Path):
    write_corpus(tmp_path)
    path = tmp_path / "corpus.txt"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, *others, first, others[0]]))
    data = build_task_data(data_config(tmp_path), 64)
    train, valid = ({texts(split, n)[1] for n in range(len(split))} for split in (data.train, data.valid))
    assert {first, others[0]} <= valid
    assert not train & valid


def test_a_batch_is_what_the_model_is_called_with(tmp_path: Path):
    pairs = build_task_data(data_config(tmp_path), 64).train
    numbers = [5, 0, 31, 8]
    batch = pairs.batch(numbers)
    inputs = batch.inputs
    for row, number in enumerate(numbers):
        task, source, target = texts(pairs, number)
        expected = encode_source(ByteTokenizer(), task, source)
        assert inputs["task_B"][row] == task
        assert inputs["sample_B"][row] == pairs.pair_of_sample[number]
        assert inputs["source_BS"][row, : inputs["source_length_B"][row]].tolist() == expected
        wanted = [*target.encode(), 256]
        length = inputs["length_B"][row]
        assert length == len(wanted)
        assert batch.targets[row, :length].tolist() == wanted
        assert inputs["ids_BT"][row, :length].tolist() == [256, *wanted[:-1]]
        assert (batch.targets[row, length:] == IGNORED).all()
    assert pairs.num_targets(numbers) == int((batch.targets != IGNORED).sum())
    longest = int(inputs["source_length_B"].max()), int(inputs["length_B"].max())
    assert (inputs["source_BS"].shape[1], inputs["ids_BT"].shape[1]) == longest


def test_sizes_and_lengths_decide_which_pairs_there_are(tmp_path: Path):
    whole = build_task_data(data_config(tmp_path), 64)
    small = build_task_data(data_config(tmp_path, sizes=[1.0, 0.25]), 64)
    copies, others = np.bincount(small.train.task_of_pair)
    assert copies == np.bincount(whole.train.task_of_pair)[0]
    assert others == pytest.approx(copies / 4, abs=1)
    assert len(small.valid) == len(whole.valid)
    short = build_task_data(data_config(tmp_path), 40)
    assert 0 < len(short.train) < len(whole.train)
    assert max(short.train.sources.lengths.max(), short.train.targets.lengths.max()) <= 40
    assert len({data.fingerprint for data in (whole, small, short)}) == 3


def test_an_order_of_lines_or_a_process_changes_nothing(tmp_path: Path):
    first = build_task_data(data_config(tmp_path), 64)
    assert build_task_data(data_config(tmp_path), 64).fingerprint == first.fingerprint
    assert build_task_data(data_config(tmp_path, temperature=2.0), 64).fingerprint != first.fingerprint
    counts = Counter(first.train.targets.ids.tolist())
    p = np.array(list(counts.values())) / sum(counts.values())
    assert first.train.target_entropy() == pytest.approx(-(p * np.log(p)).sum())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1e6])
def test_temperature_decides_how_often_a_small_task_is_drawn(temperature: float):
    counts = [400, 100, 4]
    pairs = spread(counts, temperature)
    by_task = np.bincount(np.repeat(range(3), counts)[pairs], minlength=3)
    wanted = np.array(counts) ** (1 / temperature)
    np.testing.assert_allclose(by_task, wanted / wanted[0] * 400, atol=0.51)
    times = np.bincount(pairs, minlength=sum(counts))
    for first, count in ((0, 400), (400, 100), (500, 4)):  # every pair, and those of a task equally often
        own = times[first : first + count]
        assert own.min() >= 1
        assert own.max() - own.min() <= 1
    share = by_task / len(pairs)
    for start in range(0, len(pairs) - 50, 37):  # any stretch holds the tasks as the whole does
        window = np.bincount(np.repeat(range(3), counts)[pairs[start : start + 50]], minlength=3)
        assert np.abs(window - 50 * share).max() <= 2


def test_input_that_makes_no_pairs_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no train pair of copy fits into train.seq_len=3"):
        build_task_data(data_config(tmp_path), 3)
    config = data_config(tmp_path)
    config.tokenizer = TokenizerConfig(kind=TokenizerKind.bpe)
    with pytest.raises(DataError, match=r"data.tokenizer.kind=bpe: data=multitask trains no tokenizer"):
        build_task_data(config, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"data.multitask.tasks=\[\]: name one task or more"),
        ({"tasks": ["copy", "copy"]}, "each once"),
        ({"tasks": ["copy"], "sizes": [0.5, 0.5]}, r"data.multitask.sizes=\[0.5, 0.5\]: list a number in \(0, 1\]"),
        ({"tasks": ["copy"], "sizes": [1.5]}, r"data.multitask.sizes=\[1.5\]"),
        ({"tasks": ["copy"], "temperature": 0.5}, "data.multitask.temperature=0.5: use 1 or more"),
    ],
)
def test_settings_are_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MultitaskConfig(**options)


def test_settings_without_use_are_refused():
    with pytest.raises(ValueError, match=r"data.multitask has no use with data.source=stdlib"):
        DataConfig(multitask=MultitaskConfig(["copy"]))
    with pytest.raises(ValueError, match=r"data.multitask is not set: data.source=multitask needs its tasks"):
        DataConfig(source="multitask")


# Whole runs


def tiny_settings(directory: Path, schema: type = Config, *overrides: str) -> Any:
    """A tiny run: experts by task in the encoder, by token in the decoder unless overrides say otherwise."""
    data = data_config(directory, sizes=[1.0, 0.5], temperature=5.0)
    router = {"name": "task", "top_k": 2, "load_balance_loss": 0.01}
    moe = {"experts": [4], "every": 1, "router": router}
    settings = {
        "model": {
            "name": "tiny",
            "kind": "encoder_decoder",
            "max_seq_len": 64,
            "dim": 16,
            "num_layers": 1,
            "num_heads": 2,
            "ffn_dim": 16,
            "moe": moe,
            "encoder": {"num_layers": 1, "moe": moe},
        },
        "data": OmegaConf.structured(data),
        "comm": {"timeout_s": 30.0},
        "train": {"steps": 4, "seq_len": 64, "global_batch": 8, "micro_batch": 2},
        "eval": {"every": 2, "batches": 2},
        "run": {"dir": str(directory / "run")},
    }
    merged = OmegaConf.merge(OmegaConf.structured(schema), settings, OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.to_object(merged)


def start(directory: Path, *overrides: str) -> Run:
    config = tiny_settings(directory, Config, *overrides)
    validate(config, 1)
    return set_up(config, directory / "run", join_world(config.comm))


def curve(directory: Path, *overrides: str) -> tuple[list[tuple[float, float]], Any]:
    """Loss and gradient norm of 3 steps, and the evaluation behind them."""
    run = start(directory, *overrides)
    init_weights(run.model, 0)
    records = [train_step(run, step) for step in range(3)]
    return [(record["loss"], record["grad_norm"]) for record in records], evaluate(run)


def test_two_ranks_train_and_evaluate_as_one(tmp_path: Path):
    write_corpus(tmp_path)
    mixed = "model.encoder.moe.router.name=sentence"
    [(alone, evaluation)] = run_distributed(curve, 1, tmp_path, mixed, init=False)
    for together, other in run_distributed(curve, 2, tmp_path, mixed, init=False):
        np.testing.assert_allclose(together, alone, rtol=1e-5)
        assert other.loss == pytest.approx(evaluation.loss, rel=1e-6)
        assert other.loss_by_group == pytest.approx(evaluation.loss_by_group, rel=1e-6)


def train_run(directory: Path) -> dict[str, Any]:
    return workers.train(tiny_settings(directory), None)


def export(directory: Path, *overrides: str) -> dict[str, Any] | str:
    """What the command returns, or what it refuses with."""
    config = tiny_settings(directory, ExportConfig, "format=task", f"out={directory / 'rot13'}", *overrides)
    try:
        return workers.export(config, directory / "run")
    except (ConfigError, CheckpointError) as error:
        return str(error)


def whole_model(directory: Path) -> tuple[dict[str, Any], torch.Tensor, str]:
    """A batch of the task rot13, the whole model's logits for it, and what it makes of the prompt."""
    run = start(directory)
    workers._load_model(run)
    batch = run.data.valid.batch(range(6))
    inputs = {name: x[batch.inputs["task_B"] == 1] for name, x in batch.inputs.items()}
    logits = run.model.eval()(**inputs).logits.detach()
    return inputs, logits, generate_text(run, tiny_settings(directory, Config, "generate.task=rot13").generate)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 2 ranks and its summary."""
    directory = tmp_path_factory.mktemp("finished")
    write_corpus(directory)
    return directory, run_distributed(train_run, 2, directory, init=False)[0]


def test_a_run_tells_of_every_task(finished: tuple[Path, dict[str, Any]]):
    directory, summary = finished
    losses = summary["valid_loss_by_task"]
    assert list(losses) == ["copy", "rot13"]
    assert min(losses.values()) < summary["valid_loss"] < max(losses.values())
    records = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [list(r["valid_loss_by_task"]) for r in records if r["kind"] == "eval"] == [["copy", "rot13"]] * 2
    assert [line.partition(":")[0] for line in summary["sample"].splitlines()] == ["copy", "rot13"]


def test_an_exported_task_is_the_whole_model_for_this_task(finished: tuple[Path, dict[str, Any]]):
    directory, _ = finished
    told, other = run_distributed(export, 2, directory, "task=rot13", init=False)
    assert told == other
    files = sorted(path.name for path in (directory / "rot13").iterdir())
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    made = load_task(directory / "rot13")
    assert (made.task, made.number) == ("rot13", 1)
    assert told["parameters"] == sum(p.numel() for p in made.model.parameters())
    assert told["ratio"] > 1

    [(inputs, logits, text)] = run_distributed(whole_model, 1, directory, init=False)
    is_target = torch.arange(logits.shape[1]) < inputs["length_B"][:, None]
    del inputs["task_B"], inputs["sample_B"]
    with torch.no_grad():
        own = made.model(**inputs).logits
    torch.testing.assert_close(own[is_target], logits[is_target], atol=1e-6, rtol=0)
    config = tiny_settings(directory).generate
    assert made.translate([config.prompt, "of hop"], config.max_new_tokens)[0] == text

    for task, message in (("klingon", "task=klingon: use one of copy, rot13"), ("copy", "holds something already")):
        [refusal] = run_distributed(export, 1, directory, f"task={task}", init=False)
        assert message in refusal


def test_what_is_no_exported_task_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="format=task needs to know which of the run's tasks to cut out"):
        ExportConfig(format="task")
    with pytest.raises(ValueError, match="task=copy has no use with format=hf"):
        ExportConfig(task="copy")
    with pytest.raises(CheckpointError, match="no model of a task, or a damaged one"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.multitask.tasks=[copy,rot31]"], "data.multitask.tasks=rot31: unknown, did you mean 'rot13'"),
        (["model.kind=decoder", "model.encoder=null"], "model.kind=decoder cannot learn from data.source=multitask"),
        (["model.moe.router.name=expert_choice"], "model.moe.router.name=expert_choice: "),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_settings(tmp_path, Config, *overrides), 1)
