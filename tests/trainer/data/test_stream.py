"""Streams: their windows are a function of their numbers, whoever asks, in whatever order, and after any stop."""

import inspect
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end.runs import records
from tests.tiny import tiny_config
from tests.trainer.data.test_hf import write
from tests.trainer.data.texts import POEM, silent
from twohop.trainer.config import DataConfig, DataOrder, HFConfig, TokenizerConfig, TokenizerKind
from twohop.trainer.data import Loader, TokenWindows, build_data, prepare
from twohop.trainer.data.hf import pinned_revision
from twohop.trainer.data.stream import Lane, StreamWindows, _is_kept
from twohop.trainer.errors import ConfigError, DataError
from twohop.trainer.validate.groups import validate

TEXTS = [f"document {i} " + POEM * (i % 7) for i in range(240)]
SEQ = 16


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Four files with 60 rows each."""
    root = tmp_path_factory.mktemp(request.param) / "set"
    for file in range(4):
        write(root / f"{file}.{request.param}", TEXTS[file * 60 : (file + 1) * 60])
    return root


def stream_config(cache: Path, folder: Path, **hf: Any) -> DataConfig:
    settings = HFConfig(**{"streaming": True, "valid_mib": 1e-3} | hf)
    return DataConfig(source="hf", files=str(folder), hf=settings, cache_dir=str(cache), valid_fraction=0.2)


def windows(cache: Path, folder: Path, global_batch: int = 8, **hf: Any) -> StreamWindows:
    train = build_data(stream_config(cache, folder, **hf), SEQ, silent, global_batch).train
    assert isinstance(train, StreamWindows)
    return train


def ids(samples: Any, numbers: list[int]) -> list[list[int]]:
    batch = samples.batch(numbers)
    assert torch.equal(batch.inputs["ids_BT"][:, 1:], batch.targets[:, :-1])
    assert batch.inputs["sample_B"].tolist() == numbers
    return torch.cat([batch.inputs["ids_BT"], batch.targets[:, -1:]], 1).tolist()


def test_a_stream_of_one_lane_is_the_prepared_data_again_and_again(tmp_path: Path, folder: Path) -> None:
    config = stream_config(tmp_path, folder, streaming=False, valid_mib=1.0)
    whole = build_data(config, SEQ, silent)
    tokens = whole.train.tokens  # type: ignore[attr-defined]
    twice = TokenWindows(np.concatenate([tokens, tokens]), SEQ, "train")
    stream = windows(tmp_path, folder)
    assert ids(stream, list(range(len(twice)))) == ids(twice, list(range(len(twice))))
    assert stream.num_targets(range(5)) == 5 * SEQ
    # The validation split is the beginning of the prepared one, up to the row with which it is long enough.
    valid = build_data(stream_config(tmp_path, folder), SEQ, silent).valid.tokens  # type: ignore[attr-defined]
    *_, before, _ = [0, *np.flatnonzero(valid == valid[-1]) + 1]
    ends = (valid == valid[-1]).sum()
    assert before - (ends - 1) < 1e-3 * 2**20 <= len(valid) - ends
    assert valid.tolist() == whole.valid.tokens[: len(valid)].tolist()  # type: ignore[attr-defined]


def test_splits_that_the_library_finds_are_read_whole(tmp_path: Path) -> None:
    for split, texts in (("train", TEXTS[:40]), ("test", TEXTS[40:60])):
        write(tmp_path / "set" / f"{split}.csv", texts)  # the library knows its columns by the first row alone
    settings = {"valid_split": "test", "valid_mib": 1.0}
    whole = build_data(stream_config(tmp_path, tmp_path / "set", streaming=False, **settings), SEQ, silent)
    stream = windows(tmp_path, tmp_path / "set", **settings)
    assert ids(stream, list(range(len(whole.train)))) == ids(whole.train, list(range(len(whole.train))))
    valid = build_data(stream_config(tmp_path, tmp_path / "set", **settings), SEQ, silent).valid
    assert valid.tokens.tolist() == whole.valid.tokens.tolist()  # type: ignore[attr-defined]


def test_a_stream_is_told_from_others_by_its_settings_and_the_sizes_of_its_files(tmp_path: Path) -> None:
    file = tmp_path / "set" / "a.jsonl"
    write(file, TEXTS[:40])

    def fingerprint(fraction: float = 0.2, **hf: Any) -> str:
        config = stream_config(tmp_path, file.parent, **hf)
        config.valid_fraction = fraction
        return build_data(config, SEQ, silent).fingerprint

    found = [fingerprint(), fingerprint(0.3), fingerprint(shuffle=4)]
    write(file, TEXTS[:41])
    assert len({*found, fingerprint()}) == 4
    with pytest.raises(DataError, match=r"no row validates; raise data\.valid_fraction or set data\.hf\.valid_split"):
        fingerprint(1e-9)


@pytest.mark.parametrize("lanes", [2, 8])  # whole files, or every eighth row
def test_lanes_share_out_a_batch(tmp_path: Path, folder: Path, lanes: int) -> None:
    stream = windows(tmp_path, folder, lanes=lanes)
    found = ids(stream, list(range(80 * 8)))
    in_a_row = 8 // lanes
    for lane in range(lanes):
        own = [window for n, window in enumerate(found) if n // in_a_row % lanes == lane]
        for before, after in pairwise(own):
            assert before[-1] == after[0]  # they follow each other
    # A rank that takes every second sequence of a batch, from the middle on, reads the same.
    other = windows(tmp_path / "elsewhere", folder, lanes=lanes)
    numbers = [n for n in range(50 * 8, 80 * 8) if n % 2]
    assert ids(other, numbers) == [found[n] for n in numbers]


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by 1 whenever a lane reads rows."""
    seen: list[int] = []
    plain = Lane._read

    def counted(lane: Lane) -> None:
        seen.append(1)
        plain(lane)

    monkeypatch.setattr(Lane, "_read", counted)
    return seen


@pytest.mark.parametrize("shuffle", [1, 16])
def test_a_stream_goes_on_from_a_bookmark_or_without_one(
    tmp_path: Path, folder: Path, shuffle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twohop.trainer.data.stream._ROWS_AT_ONCE", 2)
    stream = windows(tmp_path, folder, lanes=2, shuffle=shuffle)
    found = ids(stream, list(range(2000)))
    late = list(range(1900, 2000))
    read = count_rows(monkeypatch)
    assert ids(windows(tmp_path, folder, lanes=2, shuffle=shuffle), late) == found[1900:]
    with_bookmarks = len(read)
    assert ids(windows(tmp_path / "other", folder, lanes=2, shuffle=shuffle), late) == found[1900:]
    assert len(read) - with_bookmarks > 3 * with_bookmarks
    # A damaged bookmark is passed over, and one may go back.
    *_, marks = (sorted(lane.iterdir()) for lane in tmp_path.glob("*/bookmarks-*/lane-*"))
    numbers = [int(mark.stem) for mark in marks]
    assert numbers == [number for number in range(numbers[-1] + 1) if _is_kept(number, numbers[-1])]
    for mark in marks[5:]:
        mark.write_text(mark.read_text()[:-5] if int(mark.stem) % 2 else "{}")
    again = windows(tmp_path, folder, lanes=2, shuffle=shuffle)
    assert ids(again, late) == found[1900:]
    assert ids(again, [3, 900, 40]) == [found[3], found[900], found[40]]
    for mark in marks:
        mark.unlink(missing_ok=True)
    assert ids(again, [1900, 4]) == [found[1900], found[4]]


def test_bookmarks_that_cannot_be_written_are_an_error(tmp_path: Path, folder: Path) -> None:
    lane = windows(tmp_path, folder)._make_lane(0, 4)
    lane._bookmarks = tmp_path / "file" / "bookmarks"
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"000\.json: cannot be written \(Not a directory\); choose another data\.cache"
    ):
        lane.block(0)


def test_shuffling_moves_windows_within_their_block_alone(tmp_path: Path, folder: Path) -> None:
    plain, shuffled = (windows(tmp_path, folder, shuffle=shuffle) for shuffle in (1, 16))
    orders = []
    for block in range(4):
        own = list(range(block * 16, block * 16 + 16))
        before, after = ids(plain, own), ids(shuffled, own)
        assert sorted(before) == sorted(after)
        orders.append([before.index(window) for window in after])
    assert len({tuple(order) for order in [*orders, list(range(16))]}) == 5


class Numbered:
    """A lane whose windows are their own numbers, 16 of them in a block."""

    def block(self, number: int) -> np.ndarray:
        return np.arange(16 * number, 16 * (number + 1))[:, None].repeat(SEQ + 1, 1)


def test_lanes_are_shuffled_in_different_ways() -> None:
    stream = StreamWindows(lambda lane, block: Numbered(), 2, SEQ, 8, 16)  # type: ignore[arg-type, return-value]
    numbers_N = stream.batch(range(32)).targets[:, 0].view(4, 2, 4)  # batches, lanes, windows of each
    first, second = (numbers_N[:, lane].flatten().tolist() for lane in (0, 1))
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second


def test_readers_of_a_lane_are_closed_with_it(tmp_path: Path, folder: Path) -> None:
    stream = windows(tmp_path, folder)
    stream.batch([0])
    ((_, lane),) = stream._lanes.items()
    rows = lane._texts
    assert inspect.getgeneratorstate(rows) == inspect.GEN_SUSPENDED
    del stream, lane
    assert inspect.getgeneratorstate(rows) == inspect.GEN_CLOSED


def test_bookmarks_stay_few() -> None:
    kept: list[int] = []
    for newest in range(5000):
        kept = [number for number in [*kept, newest] if _is_kept(number, newest)]
    assert kept[-16:] == list(range(4984, 5000))
    assert len(kept) < 16 * 10
    assert all(_is_kept(number, 0) for number in kept)  # those ahead of a run that begins again
    assert all(4999 - before < 1.2 * (4999 - after) + 16 for before, after in pairwise(kept))


def overrides(folder: Path) -> list[str]:
    hf = "{streaming: true, lanes: 4, shuffle: 8, valid_mib: 0.001}"
    return ["data.source=hf", f"data.files={folder}", f"data.hf={hf}", "data.valid_fraction=0.2", "train.steps=3"]


def test_training_does_not_depend_on_ranks_or_prefetch(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl", TEXTS)
    plain = overrides(tmp_path / "set")
    # The time is for the import of `datasets`, which the processes have not needed before.
    (expected,) = run_distributed(records, 1, tmp_path, plain, init=False, timeout=240)
    for ours in run_distributed(records, 2, tmp_path, [*plain, "data.prefetch=2"], init=False, timeout=240):
        for key in ("loss", "grad_norm"):
            assert [record[key] for record in ours] == pytest.approx([record[key] for record in expected], rel=1e-5)


def test_a_step_has_the_same_data_after_a_stop(tmp_path: Path, folder: Path) -> None:
    config = tiny_config(tmp_path, *overrides(folder))

    def of_step(step: int, first: int) -> list[list[int]]:
        data = build_data(config.data, SEQ, silent, config.train.global_batch)
        loader = Loader(config, data, torch.device("cpu"), 0, 1)
        for before in range(first, step):
            loader.step(before)
        return [row for micro in loader.step(step).micro_batches for row in micro.load().inputs["ids_BT"].tolist()]

    assert of_step(30, 0) == of_step(30, 30)


def test_a_part_without_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "few" / "train.parquet", TEXTS[:3])
    write(tmp_path / "few" / "test.parquet", TEXTS[3:9])
    with pytest.raises(DataError, match=r"a part of the stream has no text; use fewer data\.hf\.lanes"):
        ids(windows(tmp_path, tmp_path / "few", lanes=4, valid_split="test"), list(range(8)))


def test_the_hub_is_asked_once_for_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, name: str, revision: str | None) -> Any:
        raise OSError(f"no way to {name}@{revision}")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    config = DataConfig(source="hf", hf=HFConfig(name="a/b", revision="main", streaming=True), cache_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.hf\.name=a/b: the hub does not answer \(no way to a/b@main\)"):
        build_data(config, SEQ, silent)
    here = replace(config, hf=HFConfig(name=str(tmp_path), streaming=True))
    assert pinned_revision(here) == here  # a folder is on no hub
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, revision: SimpleNamespace(sha=f"{revision}-7"))
    assert pinned_revision(config) == replace(config, hf=HFConfig(name="a/b", revision="main-7", streaming=True))


def test_prepare_reads_all_and_refuses_a_stream(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.hf\.streaming=true has no use with prepare"):
        prepare(stream_config(tmp_path, folder), tmp_path / "out", silent)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer": TokenizerConfig(TokenizerKind.bpe)}, r"data\.tokenizer\.kind=bpe does not go with"),
        ({"order": DataOrder.batches}, r"data\.order=batches does not go with"),
        ({"document_mask": True}, r"data\.document_mask=True does not go with"),
        ({"max_mib": 2.0}, r"data\.max_mib=2\.0 does not go with"),
    ],
)
def test_keys_that_do_not_go_with_streams_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="hf", files="x", hf=HFConfig(streaming=True), **keys)


@pytest.mark.parametrize("key", ["lanes", "shuffle", "valid_mib"])
def test_keys_of_streams_alone_are_refused_without(key: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.hf\.{key}=2 has no use with data\.hf\.streaming=false"):
        HFConfig(**{key: 2})


def test_lanes_divide_the_batch(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.source=hf", "data.hf={streaming: true, lanes: 3}")
    with pytest.raises(ConfigError, match=r"data\.hf\.lanes=3 does not divide train\.global_batch=8: .*\[1, 2, 4, 8\]"):
        validate(config, 1)
