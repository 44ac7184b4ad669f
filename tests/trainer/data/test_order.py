"""Windows of tokens, and which of them comes when."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.data.texts import silent, text_config
from twohop.trainer.config import DataOrder
from twohop.trainer.data import (
    TokenWindows,
    build_data,
    sample_index,
    sample_numbers,
    step_numbers,
)
from twohop.trainer.errors import DataError


@given(count=st.integers(2, 200), seq_len=st.integers(1, 50))
def test_windows_predict_every_token_once(count: int, seq_len: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    if count <= seq_len:
        with pytest.raises(DataError, match=rf"train.seq_len={seq_len}: the valid split has only {count} tokens"):
            TokenWindows(tokens, seq_len, "valid")
        return
    windows = TokenWindows(tokens, seq_len, "valid")
    samples = [windows.window(i) for i in range(len(windows))]
    assert all(s.dtype == torch.int64 and s.shape == (seq_len + 1,) for s in samples)
    targets = torch.cat([s[1:] for s in samples]).tolist()
    assert targets == list(range(1, len(targets) + 1))
    assert count - 1 - len(targets) < seq_len
    for beyond in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows.window(beyond)


def test_sequence_longer_than_the_data_names_the_cure(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train.seq_len=100000: the train split .* use train.seq_len<="):
        build_data(text_config(tmp_path, folder), 100_000, silent)


def test_unigram_entropy_is_that_of_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twohop.trainer.data.tokens._COUNT_BLOCK", 7)  # many blocks, with different largest ids
    tokens = np.random.default_rng(0).zipf(1.5, 1000).clip(max=500).astype(np.uint16)
    expected = -sum(n / 1000 * math.log(n / 1000) for n in Counter(tokens.tolist()).values())
    assert TokenWindows(tokens, 4, "train").target_entropy() == pytest.approx(expected, rel=1e-12)
    uniform = TokenWindows(np.arange(64, dtype=np.uint8), 4, "train")
    assert uniform.target_entropy() == pytest.approx(math.log(64), rel=1e-12)


@given(seed=st.integers(-5, 2**64), num_samples=st.integers(1, 300), epoch=st.integers(0, 1000))
def test_each_epoch_sees_every_sample_once(seed: int, num_samples: int, epoch: int) -> None:
    start = epoch * num_samples
    drawn = [sample_index(seed, start + i, num_samples) for i in range(num_samples)]
    assert sorted(drawn) == list(range(num_samples))


@given(world=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 3))
def test_order_knows_no_world_size(world: int, seed: int) -> None:
    # Global batches of 16 in micro-batches of 2, dealt out to the ranks in turn: 3 epochs of 48 windows.
    windows = TokenWindows(np.arange(48 * 4 + 1, dtype=np.uint16), 4, "train")
    seen: dict[int, list[int]] = {}
    for rank in range(world):
        for first in range(2 * rank, 3 * 48, 2 * world):
            batch = windows.batch(sample_numbers(seed, first, 2, len(windows)))
            assert batch.inputs["ids_BT"].shape == batch.targets.shape == (2, 4)
            assert torch.equal(batch.inputs["ids_BT"] + 1, batch.targets)
            seen[first] = (batch.inputs["ids_BT"][:, 0] // 4).tolist()
    order = [sample for first in sorted(seen) for sample in seen[first]]
    assert order == [sample_index(seed, i, 48) for i in range(3 * 48)]
    assert Counter(order) == dict.fromkeys(range(48), 3)


@given(seed=st.integers(0, 9), size=st.integers(1, 9), num_samples=st.integers(9, 60))
def test_batches_come_again_whole_and_in_another_order(seed: int, size: int, num_samples: int) -> None:
    def epoch(number: int) -> list[tuple[int, ...]]:
        batches = num_samples // size
        steps = range(number * batches, (number + 1) * batches)
        return [tuple(step_numbers(DataOrder.batches, seed, step, size, num_samples)) for step in steps]

    first = epoch(0)
    samples = [sample for batch in first for sample in batch]
    assert len(samples) == len(set(samples)) == num_samples // size * size
    assert set(samples) == {sample_index(seed, i, num_samples) for i in range(len(samples))}
    for number in (1, 2):
        assert sorted(epoch(number)) == sorted(first)
    if len(first) > 6:
        assert len({tuple(epoch(number)) for number in range(4)}) > 1


def test_order_of_samples_is_the_default_and_needs_no_batches() -> None:
    drawn = [sample for step in range(3) for sample in step_numbers(DataOrder.samples, 3, step, 7, 10)]
    assert drawn == [sample_index(3, i, 10) for i in range(21)]


def test_order_differs_by_epoch_and_seed_and_never_changes() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [sample_index(seed, number * 50 + i, 50) for i in range(50)]

    assert len({tuple(epoch(seed, number)) for seed in range(4) for number in range(4)}) == 16
    # Fixed numbers: a run resumed with a later numpy must go on with the same order.
    assert [sample_index(0, i, 10) for i in range(20)] == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
