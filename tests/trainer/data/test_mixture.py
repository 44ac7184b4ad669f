"""Mixtures of corpora: whose sample comes when, what batches hold, and losses by corpus."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed import run_distributed
from tests.end_to_end.runs import start
from tests.tiny import tiny_config
from tests.trainer.data.texts import silent
from twohop.trainer.config import CorpusConfig, DataConfig, DataOrder, HFConfig, TokenizerConfig, TokenizerKind
from twohop.trainer.data import IGNORED, TokenWindows, build_data, prepare, step_numbers
from twohop.trainer.data.documents import DocumentWindows
from twohop.trainer.data.mixture import Joined
from twohop.trainer.data.order import DRAWS, ENDLESS, Mixture, shares
from twohop.trainer.errors import ConfigError, DataError
from twohop.trainer.evaluate import evaluate
from twohop.trainer.loop import train_step
from twohop.trainer.validate.groups import validate


def drawn(mixture: Mixture, seed: int, first: int, count: int) -> list[int]:
    """Samples from `first` on, asked for in batches of 8."""
    assert first % 8 == 0
    steps = range(first // 8, -(-(first + count) // 8))
    size = sum(mixture.lengths)
    return [n for step in steps for n in step_numbers(DataOrder.samples, seed, step, 8, size, mixture)][:count]


@given(weights=st.lists(st.floats(1e-3, 1), min_size=2, max_size=6), draws=st.integers(1, 1000))
def test_shares_are_rounded_and_add_up(weights: list[float], draws: int) -> None:
    counts = shares(tuple(weights), draws)
    assert sum(counts) == draws
    assert all(abs(count - weight / sum(weights) * draws) < 1 for count, weight in zip(counts, weights, strict=True))


@pytest.mark.parametrize("first", [0, 5000 * 8, DRAWS - 4000])  # the last one crosses from one round to the next
def test_every_stretch_has_the_shares_of_the_whole(first: int) -> None:
    weights = (0.7, 0.2, 0.07, 0.03)
    mixture = Mixture((1000, 10, 300, 7), weights)
    corpora = np.searchsorted(np.cumsum(mixture.lengths), drawn(mixture, 3, first, 8000), side="right")
    for begin in range(0, 8000, 61):
        for length in (1, 10, 100, 1000):
            stretch = corpora[begin : begin + length]
            for corpus, weight in enumerate(weights):
                # Up to a place of the round, a corpus is within one of its share, and the place is off by as many as
                # there are corpora; a stretch is the difference of two places.
                assert abs((stretch == corpus).sum() - weight * len(stretch)) <= 2 * (1 + len(weights) * weight)


def test_each_corpus_has_epochs_of_its_own() -> None:
    mixture = Mixture((40, 9), (3.0, 1.0))
    numbers = drawn(mixture, 5, 0, 480)
    for first, length in ((0, 40), (40, 9)):
        own = [number - first for number in numbers if first <= number < first + length]
        assert len(own) > 3 * length
        epochs = [own[at : at + length] for at in range(0, len(own) - length, length)]
        assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert drawn(mixture, 6, 0, 480) != numbers
    assert drawn(mixture, 5, 240, 240) == numbers[240:]  # a function of the place alone
    # Fixed numbers: a run resumed with a later numpy must go on with the same draws.
    assert numbers[:20] == [16, 14, 44, 24, 25, 29, 48, 30, 17, 4, 9, 47, 7, 39, 45, 37, 41, 13, 1, 32]


def test_a_stream_is_drawn_in_its_own_order() -> None:
    mixture = Mixture((5, ENDLESS), (1.0, 1.0))
    streamed = [number - 5 for number in drawn(mixture, 0, 0, 80) if number >= 5]
    assert streamed == list(range(len(streamed)))
    assert len(streamed) > 30


def windows(first: int, count: int) -> TokenWindows:
    return TokenWindows(np.arange(first, first + 4 * count + 1, dtype=np.uint16), 4, "train")


@given(data=st.data())
@settings(max_examples=20)
def test_a_batch_holds_the_samples_that_were_asked_for(data: st.DataObject) -> None:
    parts = [windows(0, 5), windows(1000, 3), windows(2000, 6)]
    joined = Joined(parts)
    numbers = data.draw(st.lists(st.integers(0, 13), min_size=1, max_size=10))
    batch = joined.batch(numbers)
    assert batch.inputs["sample_B"].tolist() == numbers
    assert batch.group_B is not None
    for row, number in enumerate(numbers):
        part = (number >= 5) + (number >= 8)
        own = parts[part].batch([number - (0, 5, 8)[part]])
        assert torch.equal(batch.inputs["ids_BT"][row], own.inputs["ids_BT"][0])
        assert torch.equal(batch.targets[row], own.targets[0])
        assert batch.group_B[row] == part
    assert joined.num_targets(numbers) == 4 * len(numbers)
    for outside in (14, -1):
        with pytest.raises(IndexError, match=f"sample {outside} of 14"):
            joined.batch([outside])


def test_samples_of_a_part_stand_in_the_middle_of_what_is_due_to_them() -> None:
    joined = Joined([windows(0, 6), windows(1000, 2)], [3.0, 1.0])
    groups_B = joined.batch(range(8)).group_B
    assert groups_B is not None
    assert groups_B.tolist() == [0, 0, 1, 0, 0, 0, 1, 0]


def test_parts_of_equal_weight_take_turns() -> None:
    groups_B = Joined([windows(0, 90), windows(1000, 90)], [1.0, 1.0]).batch(range(180)).group_B
    assert groups_B is not None
    assert groups_B.tolist() == [0, 1] * 90


def test_targets_and_entropy_are_those_of_the_parts() -> None:
    parts = [windows(0, 5), DocumentWindows(np.array([1, 2, 9] * 4 + [1]), 4, "train", 9)]
    joined = Joined(parts, [2.0, 1.0])
    numbers = range(8)
    assert joined.num_targets(numbers) == 5 * 4 + 3 * 4 - 4  # each end of a document predicts nothing
    assert [joined.num_targets([n]) for n in numbers] == [(joined.batch([n]).targets != IGNORED).sum() for n in numbers]
    first, second = (part.target_entropy() for part in parts)
    assert joined.target_entropy() == pytest.approx((5 * first + 3 * second) / 8)


def test_validation_begins_with_the_shares_of_the_weights_and_has_every_sample_once() -> None:
    joined = Joined([windows(0, 90), windows(1000, 90)], [2.0, 1.0])
    batch = joined.batch(range(180))
    assert batch.group_B is not None
    assert Counter(batch.group_B[:30].tolist()) == {0: 20, 1: 10}
    assert len({tuple(ids) for ids in batch.inputs["ids_BT"].tolist()}) == 180


def corpora(directory: Path) -> list[str]:
    """Overrides for two texts that differ."""
    (directory / "a.txt").write_text("token rank hop " * 400)
    (directory / "b.txt").write_text("0123456789 " * 300)
    parts = ["{name: words, weight: 3, files: %s/a.txt}", "{name: digits, files: %s/b.txt}"]
    mixture = "[" + ", ".join(part % directory for part in parts) + "]"
    return ["data.source=mixture", "data.files=null", f"data.mixture={mixture}"]


def losses(directory: Path, overrides: list[str]) -> tuple[list[float], dict[str, float]]:
    """The losses of two steps, then the validation losses: of all, and of each corpus."""
    run = start(directory, *overrides)
    trained = [train_step(run, step)["loss"] for step in range(2)]
    record = evaluate(run).record()
    return trained, {"all": record["valid_loss"], **record["valid_loss_by_corpus"]}


def test_losses_by_corpus_do_not_depend_on_ranks(tmp_path: Path) -> None:
    settings = [*corpora(tmp_path), "eval.batches=0"]
    ((trained, valid),) = run_distributed(losses, 1, tmp_path, settings, init=False)
    assert set(valid) == {"all", "words", "digits"}
    assert min(valid["words"], valid["digits"]) < valid["all"] < max(valid["words"], valid["digits"])
    for ours, by_corpus in run_distributed(losses, 2, tmp_path, settings, init=False):
        assert ours == pytest.approx(trained, rel=1e-5)
        assert by_corpus == pytest.approx(valid, rel=1e-5)


def mixture_config(root: Path, *parts: CorpusConfig, **keys: object) -> DataConfig:
    return DataConfig(source="mixture", mixture=list(parts), cache_dir=str(root / "cache"), **keys)  # type: ignore[arg-type]


def test_fingerprint_tells_weights_and_texts_apart(tmp_path: Path) -> None:
    corpora(tmp_path)
    words, digits = (CorpusConfig(name, files=str(tmp_path / f"{name}.txt")) for name in "ab")
    heavy = CorpusConfig("b", 2.0, files=digits.files)
    found = [
        build_data(mixture_config(tmp_path, *parts), 8, silent).fingerprint
        for parts in ((words, digits), (digits, words), (words, heavy))
    ]
    assert len(set(found)) == 3


def test_corpora_with_different_tokenizers_are_refused(tmp_path: Path) -> None:
    corpora(tmp_path)
    bpe = TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=300)
    folder = prepare(DataConfig(source="text", files=str(tmp_path / "b.txt"), tokenizer=bpe), tmp_path / "b", silent)
    words = CorpusConfig("a", files=str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match=r"data\.mixture: b has another tokenizer than a: prepare both"):
        build_data(mixture_config(tmp_path, words, CorpusConfig("b", source="tokens", files=str(folder))), 8, silent)
    # With the other's tokenizer.json they fit.
    same = TokenizerConfig(kind=TokenizerKind.file, file=str(folder / "tokenizer.json"))
    joined = mixture_config(tmp_path, words, CorpusConfig("b", source="tokens", files=str(folder)), tokenizer=same)
    assert build_data(joined, 8, silent).corpora == ("a", "b")


A, B = CorpusConfig("a", files="x"), CorpusConfig("b", files="y")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "mixture"}, r"data\.mixture=\[\]: list two corpora"),
        ({"source": "mixture", "mixture": [A, A]}, "each with a name of its own"),
        ({"source": "text", "mixture": [A, B]}, "data.mixture=.* has no use with data.source=text"),
        ({"source": "mixture", "mixture": [A, B], "files": "z"}, r"data\.files=\['z'\] has no use with data=mixture"),
        ({"source": "mixture", "mixture": [A, B], "max_mib": 3}, "data.max_mib=3 has no use"),
        ({"source": "mixture", "mixture": [A, B], "order": DataOrder.batches}, "data.order=batches has no use"),
        (
            {"source": "mixture", "mixture": [A, B], "tokenizer": TokenizerConfig(TokenizerKind.bpe)},
            "share a tokenizer",
        ),
        ({"source": "mixture", "mixture": [A, CorpusConfig("b", 1e-6)]}, "b has weight=1e-06, less than 1/65536"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig("b"), "data.mixture: b: data.files is not set: data=text needs"),
        (CorpusConfig("b", source="multitask"), "data.mixture.source=multitask: unknown"),
        (CorpusConfig("b", source="hf", files="x"), "data.mixture: b: data.hf is not set"),
        (CorpusConfig("b", files="x", hf=HFConfig()), "data.mixture: b: data.hf has no use"),
    ],
)
def test_a_corpus_that_cannot_be_is_named(tmp_path: Path, corpus: CorpusConfig, message: str) -> None:
    config = tiny_config(tmp_path)
    config.data = mixture_config(tmp_path, A, corpus)
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)


def test_a_weight_is_positive() -> None:
    with pytest.raises(ValueError, match=r"data\.mixture: text has weight=0"):
        CorpusConfig(weight=0)
