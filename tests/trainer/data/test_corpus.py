"""Which files belong to a corpus, and how it is split."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.texts import POEM, text_config, texts
from twohop.trainer.config import DataConfig
from twohop.trainer.data.corpus import FilePart, stdlib_corpus, text_corpus


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
@settings(max_examples=30)
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
    blocks = list(FilePart(file, "poem.txt", 0, file.stat().st_size).blocks())
    assert "".join(blocks) == POEM
    assert len(blocks) > len(POEM) // 3
