"""Token files and their cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data.texts import BPE, POEM, silent, text_config, texts
from twohop.trainer.config import DataConfig, TokenizerConfig, TokenizerKind
from twohop.trainer.data import (
    build_data,
    prepare,
)
from twohop.trainer.data.corpus import text_corpus
from twohop.trainer.data.tokenizer import ByteTokenizer
from twohop.trainer.data.tokens import open_tokens, write_tokens
from twohop.trainer.errors import DataError


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
