"""Corpora, tokenizers, token files and the order of samples."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twohop.trainer.config import DataConfig, DataOrder, TokenizerConfig, TokenizerKind
from twohop.trainer.data import (
    TokenWindows,
    build_data,
    load_tokenizer,
    prepare,
    sample_index,
    sample_numbers,
    step_numbers,
)
from twohop.trainer.data.corpus import Document, stdlib_corpus, text_corpus
from twohop.trainer.data.tokenizer import ByteTokenizer
from twohop.trainer.data.tokens import open_tokens, write_tokens
from twohop.trainer.errors import DataError

BPE = TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=300)
POEM = "Größe – ein Wort, zwei Hops: 速い道 🚀\n"


def silent(_: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small text files, of which no two are equal."""
    root = tmp_path / "texts"
    for i in range(40):
        file = root / f"part{i % 3}" / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {i}\n" + POEM * (i + 1))
    return root


def text_config(tmp_path: Path, *files: Path | str, **kwargs: Any) -> DataConfig:
    return DataConfig(source="text", files=[str(f) for f in files], cache_dir=str(tmp_path / "cache"), **kwargs)


def texts(documents: list[Document]) -> dict[str, str]:
    return {f"{d.name}[{d.start}]": "".join(d.blocks()) for d in documents}


# --- corpora


def test_stdlib_has_sources_and_neither_tests_nor_tables() -> None:
    corpus = stdlib_corpus(DataConfig())
    names = {d.name for d in corpus.train + corpus.valid}
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not [n for n in names if {"test", "tests", "site-packages", "idle_test"} & set(n.split("/"))]
    assert "pydoc_data/topics.py" not in names
    assert "encodings/cp1252.py" not in names
    assert not [n for n in names if "_sysconfigdata" in n]
    assert 0.02 < len(corpus.valid) / len(names) < 0.1
    assert sum(d.stop for d in corpus.train) > 4e6


def test_split_is_by_file_complete_and_the_same_wherever_the_folder_lies(folder: Path, tmp_path: Path) -> None:
    corpus = text_corpus(text_config(tmp_path, folder, valid_fraction=0.3))
    moved = tmp_path / "elsewhere" / "deep"
    moved.parent.mkdir()
    names = [[d.name for d in split] for split in (corpus.train, corpus.valid)]
    fingerprint = corpus.fingerprint()
    assert texts(corpus.train + corpus.valid) == {
        f"{p.relative_to(folder).as_posix()}[0]": p.read_text() for p in folder.rglob("*.txt")
    }
    assert not set(names[0]) & set(names[1])
    folder.rename(moved)
    again = text_corpus(text_config(tmp_path, moved, valid_fraction=0.3))
    assert [[d.name for d in split] for split in (again.train, again.valid)] == names
    assert again.fingerprint() == fingerprint
    # One file less moves no other file to the other split, and one byte changes the fingerprint.
    (moved / corpus.train[0].name).unlink()
    (moved / corpus.train[1].name).write_text("new")
    less = text_corpus(text_config(tmp_path, moved, valid_fraction=0.3))
    assert [[d.name for d in split] for split in (less.train, less.valid)] == [names[0][1:], names[1]]
    assert less.fingerprint() != fingerprint


@pytest.mark.parametrize(("fraction", "expected"), [(1e-9, 1), (1 - 1e-9, 39)])
def test_both_splits_have_a_file(folder: Path, tmp_path: Path, fraction: float, expected: int) -> None:
    corpus = text_corpus(text_config(tmp_path, folder, valid_fraction=fraction))
    assert (len(corpus.train), len(corpus.valid)) == (40 - expected, expected)


def test_files_folders_and_globs_name_the_same_file_once(folder: Path, tmp_path: Path) -> None:
    (folder / ".hidden").write_bytes(b"\xff")
    config = text_config(tmp_path, folder, f"{folder}/**/*.txt", folder / "part0" / "00.txt")
    corpus = text_corpus(config)
    assert len(corpus.train + corpus.valid) == 40


@given(fraction=st.floats(0.05, 0.95), repeats=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_one_file_is_split_by_bytes_between_characters(
    tmp_path_factory: pytest.TempPathFactory, fraction: float, repeats: int
) -> None:
    file = tmp_path_factory.mktemp("one") / "poem.txt"
    file.write_text(POEM * repeats)
    corpus = text_corpus(text_config(file.parent, file, valid_fraction=fraction))
    (train,), (valid,) = texts(corpus.train).values(), texts(corpus.valid).values()
    assert train + valid == POEM * repeats
    wanted = len(file.read_bytes()) * (1 - fraction)
    assert wanted - 4 <= len(train.encode()) <= wanted + 1


def test_max_mib_limits_the_text_and_cuts_between_characters(folder: Path, tmp_path: Path) -> None:
    everything = sum(p.stat().st_size for p in folder.rglob("*.txt"))
    for limit in range(2000, 2008):
        corpus = text_corpus(text_config(tmp_path, folder, max_mib=limit / 2**20))
        total = sum(len(text.encode()) for text in texts(corpus.train + corpus.valid).values())
        assert limit - 4 < total <= limit < everything


def test_blocks_join_to_the_text_when_characters_straddle_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twohop.trainer.data.corpus._BLOCK", 3)
    file = tmp_path / "poem.txt"
    file.write_text(POEM)
    blocks = list(Document(file, "poem.txt", 0, file.stat().st_size).blocks())
    assert "".join(blocks) == POEM
    assert len(blocks) > len(POEM) // 3


# --- tokenizers


@pytest.mark.parametrize("config", [TokenizerConfig(), BPE], ids=["bytes", "bpe"])
@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_every_text_survives_a_round_trip(config: TokenizerConfig, text: str, trained: dict) -> None:
    tokenizer = trained[config.kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Both tokenizers, read back from a prepared folder."""
    path = tmp_path_factory.mktemp("trained")
    (path / "a.txt").write_text(POEM * 50)
    kinds = (TokenizerConfig(), BPE)
    return {c.kind: load_tokenizer(prepare(text_config(path, path / "a.txt", tokenizer=c), log=silent)) for c in kinds}


def test_byte_ids_are_the_bytes(trained: dict) -> None:
    tokenizer = trained[TokenizerKind.bytes]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode(POEM) == list(POEM.encode())
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a character


def test_text_cannot_spell_the_end_of_a_document(trained: dict) -> None:
    tokenizer = trained[TokenizerKind.bpe]
    assert tokenizer.end_of_document not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hop " * 500 + "zyzzyva " * 100)  # the last 5 % are zyzzyvas
    config = text_config(tmp_path, tmp_path / "a.txt", tokenizer=BPE, valid_fraction=0.3)
    tokenizer = load_tokenizer(prepare(config, log=silent))
    assert len(tokenizer.encode(" hop")) == 1
    assert len(tokenizer.encode(" zyzzyva")) > 4
    assert tokenizer.vocab_size <= 300


def test_any_tokenizer_json_is_used_as_the_library_uses_it(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "the", "quick", "brown", "fox", "."]
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: 10 * i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.enable_truncation(3)  # of a model's input: a corpus must not be cut by it
    library.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("the quick brown fox . " * 30)
    kind = TokenizerConfig(kind=TokenizerKind.file, file=str(tmp_path / "words.json"))
    data = build_data(text_config(tmp_path, tmp_path / "a.txt", tokenizer=kind), seq_len=4, log=silent)
    library.no_truncation()
    text = (tmp_path / "a.txt").read_text()
    ids = [data.train.tokens[:-1], data.valid.tokens[:-1]]
    assert len(np.concatenate(ids)) >= 150 > 100
    assert ids[0][:100].tolist() == library.encode(text).ids[:100]
    assert data.train.tokens[-1] == data.tokenizer.end_of_document == 10
    assert data.tokenizer.vocab_size == 10 * (len(words) - 1) + 1


# --- token files


def test_tokens_are_the_documents_each_closed_by_an_end(folder: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, folder)
    data = build_data(config, seq_len=16, log=silent)
    corpus = text_corpus(config)
    for windows, documents in ((data.train, corpus.train), (data.valid, corpus.valid)):
        expected = [i for text in texts(documents).values() for i in [*text.encode(), 256]]
        assert windows.tokens.tolist() == expected
        assert windows.num_tokens == len(expected)
        assert windows.tokens.dtype == np.dtype("<u2")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_ids_are_kept_in_the_smallest_integers(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    tokenizer.save(tmp_path)
    header = write_tokens(tmp_path / "train", [[0, 1], [], [vocab_size - 1]], tokenizer, {})
    assert (header.dtype, header.count) == (dtype, 3)
    ids, again = open_tokens(tmp_path / "train")
    assert ids.tolist() == [0, 1, vocab_size - 1]
    assert again == header


def test_a_prepared_folder_is_the_same_data(folder: Path, tmp_path: Path) -> None:
    config = text_config(tmp_path, folder, tokenizer=BPE)
    direct = build_data(config, 16, silent)
    said: list[str] = []
    made = prepare(config, tmp_path / "prepared", said.append)
    assert prepare(config, tmp_path / "prepared", said.append) == made
    assert len(said) == 1  # the second time there is nothing to do
    again = build_data(DataConfig(source="tokens", files=[str(made)]), 16, silent)
    assert again.fingerprint == direct.fingerprint
    assert again.tokenizer.encode(POEM) == direct.tokenizer.encode(POEM)
    assert again.train.tokens.tolist() == direct.train.tokens.tolist()


def test_the_cache_is_used_again_and_told_apart_by_text_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = text_config(tmp_path, folder)
    first = build_data(config, 16, said.append)
    assert build_data(config, 32, said.append).fingerprint == first.fingerprint
    assert len(said) == 1
    build_data(text_config(tmp_path, folder, tokenizer=BPE), 16, said.append)
    next(folder.rglob("*.txt")).write_text("changed")
    assert build_data(config, 16, said.append).fingerprint != first.fingerprint
    assert len(said) == 3
    assert len(os.listdir(tmp_path / "cache")) == 3


def test_two_processes_at_once_make_one_whole_cache(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from twohop.trainer.config import *; from twohop.trainer.data.build import prepare\n"
        "t = TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=300)\n"
        "print(prepare(DataConfig(source='text', files=[sys.argv[1]], cache_dir=sys.argv[2], tokenizer=t), log=len))"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {worker.communicate(timeout=60)[0] for worker in workers}
    assert [worker.returncode for worker in workers] == [0, 0]
    assert len(answers) == 1
    assert os.listdir(tmp_path / "cache") == [Path(answers.pop().strip()).name]  # nothing unfinished is left
    build_data(text_config(tmp_path, folder, tokenizer=BPE), 16, pytest.fail)


def test_losing_the_race_uses_the_winners_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(tmp_path, folder)
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        prepare(config, target, silent)  # another process is faster
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    made = prepare(config, log=silent)
    assert os.listdir(tmp_path / "cache") == [made.name]


def test_a_failed_preparation_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "zz.txt").write_bytes(b"fine until here \xff")
    with pytest.raises(DataError, match=r"zz\.txt: not UTF-8 text \(byte 16\)"):
        prepare(text_config(tmp_path, folder), tmp_path / "prepared", silent)
    (folder / "zz.txt").unlink()
    bad = TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=256)
    with pytest.raises(DataError, match="vocab_size=256"):
        prepare(text_config(tmp_path, folder, tokenizer=bad), tmp_path / "prepared", silent)
    assert os.listdir(tmp_path) == ["texts"]


def damage_truncate(folder: Path) -> None:
    os.truncate(folder / "train.bin", (folder / "train.bin").stat().st_size - 1)


def damage_flip(folder: Path) -> None:
    raw = bytearray((folder / "valid.bin").read_bytes())
    raw[7] ^= 1
    (folder / "valid.bin").write_bytes(raw)


def damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"kind": "bytes" }\n')


def damage_header(folder: Path) -> None:
    (folder / "train.json").write_text((folder / "train.json").read_text()[:40])


def damage_dtype(folder: Path) -> None:
    header = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps({**header, "dtype": "object"}))


def damage_missing(folder: Path) -> None:
    (folder / "valid.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, r"train\.bin: truncated or altered"),
        (damage_flip, r"valid\.bin: altered"),
        (damage_tokenizer, r"tokenizer\.json: altered"),
        (damage_header, r"train\.json: damaged header"),
        (damage_dtype, r"train\.json: damaged header .*object"),
        (damage_missing, r"valid\.bin: cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, tmp_path: Path, damage: object, message: str) -> None:
    made = prepare(text_config(tmp_path, folder), tmp_path / "prepared", silent)
    damage(made)  # type: ignore[operator]
    with pytest.raises(DataError, match=message + ".*prepare"):
        build_data(DataConfig(source="tokens", files=[str(made)]), 16, silent)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, "data.files is empty"),
        ({"files": ["nothing/here.txt"]}, "nothing/here.txt: no such file"),
        ({"files": ["nothing/*.txt"]}, r"nothing/\*\.txt: no such file"),
        ({"source": "web"}, "data.source=web: .*stdlib, text"),
        ({"source": "tokens", "files": ["a", "b"]}, "exactly one folder"),
        ({"source": "tokens", "files": ["nothing"]}, "nothing/tokenizer.json"),
        ({"max_mib": 1e-9}, "data.max_mib=1e-09"),
        ({"tokenizer": TokenizerConfig(kind=TokenizerKind.file, file="no.json")}, "file=no.json: no such file"),
        ({"tokenizer": TokenizerConfig(kind=TokenizerKind.file, file=__file__)}, "test_data.py: not a tokenizer.json"),
        ({"cache_dir": "/proc/nothing"}, "/proc/nothing/text-bytes-.*: cannot be written"),
    ],
)
def test_bad_settings_are_named(folder: Path, tmp_path: Path, change: dict, message: str) -> None:
    config = text_config(tmp_path, folder)
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(DataError, match=message):
        build_data(config, 16, silent)


def test_bad_files_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match="hollow: holds no file"):
        build_data(text_config(tmp_path, tmp_path / "hollow"), 16, silent)
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match=r"one\.txt: too short to be split"):
        build_data(text_config(tmp_path, tmp_path / "one.txt"), 16, silent)
    (folder / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: the file is empty"):
        build_data(text_config(tmp_path, folder), 16, silent)
    (folder / "empty.txt").write_text("no longer")

    def refuse(path: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)  # root may read any file, so the refusal is played
    with pytest.raises(DataError, match=r"\.txt: cannot be read \(Permission denied\)"):
        build_data(text_config(tmp_path, folder), 16, silent)


def test_a_folder_with_something_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    made = prepare(text_config(tmp_path, folder), tmp_path / "prepared", silent)
    with pytest.raises(DataError, match="prepared: holds tokens of another corpus"):
        prepare(text_config(tmp_path, folder, tokenizer=BPE), made, silent)
    with pytest.raises(DataError, match=r"texts/train\.json: no such file"):
        prepare(text_config(tmp_path, folder), folder, silent)
    assert load_tokenizer(made).vocab_size == 257


# --- windows, entropy, order


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
