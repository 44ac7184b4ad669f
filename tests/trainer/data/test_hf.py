"""Data sets that Hugging Face's `datasets` reads, made here as small files."""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.data.texts import POEM, silent
from twohop.trainer.config import DataConfig, HFConfig
from twohop.trainer.data import build_data, prepare
from twohop.trainer.data.hf import hf_corpus, load_split
from twohop.trainer.errors import DataError

TEXTS = [f"document {i} " + POEM * (i % 5) for i in range(60)]


def write(path: Path, texts: list[Any], column: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=7)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    else:
        quoted = [f'{i},"{text}"\n' for i, text in enumerate(texts)]
        path.write_text(f"id,{column}\n" + "".join(quoted))


def hf_config(root: Path, files: Any, max_mib: float | None = None, **hf: Any) -> DataConfig:
    return DataConfig(
        source="hf", files=files, hf=HFConfig(**hf), cache_dir=str(root / "cache"), max_mib=max_mib, valid_fraction=0.3
    )


def contents(documents: Any) -> list[str]:
    return ["".join(document.blocks()) for document in documents]


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_every_format_is_the_same_corpus(tmp_path: Path, ending: str) -> None:
    write(tmp_path / f"0.{ending}", TEXTS[:25], "body")
    write(tmp_path / f"1.{ending}", TEXTS[25:], "body")
    config = hf_config(tmp_path, str(tmp_path / f"*.{ending}"), text_key="body")
    assert load_split(config, "train").column_names == ["body"]  # others are not read
    corpus = hf_corpus(config)
    train, valid = contents(corpus.train), contents(corpus.valid)
    assert (len(train), len(valid)) == (len(corpus.train), len(corpus.valid))
    assert sorted(train + valid) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train  # in their order
    assert 0.1 < len(valid) / 60 < 0.5
    # A text's side depends on nothing but the text.
    write(tmp_path / f"2.{ending}", TEXTS[::-1], "body")
    twice = hf_corpus(hf_config(tmp_path, str(tmp_path / f"2.{ending}"), text_key="body"))
    assert contents(twice.valid) == valid[::-1]


def test_a_folder_has_the_splits_that_the_library_finds(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train-0.parquet", TEXTS[:40])
    write(tmp_path / "set" / "test-0.parquet", TEXTS[40:])
    config = hf_config(tmp_path, str(tmp_path / "set"), valid_split="test")
    assert contents(hf_corpus(config).train) == TEXTS[:40]
    assert contents(hf_corpus(config).valid) == TEXTS[40:]
    part = hf_config(tmp_path, str(tmp_path / "set"), train_split="train[:50%]", valid_split="test")
    assert contents(hf_corpus(part).train) == TEXTS[:20]
    first = hf_config(
        tmp_path, str(tmp_path / "set"), valid_split="test", max_mib=len("".join(TEXTS[:9]).encode()) / 2**20
    )
    assert contents(hf_corpus(first).train) == TEXTS[:9]
    assert len({hf_corpus(other).fingerprint() for other in (config, part, first)}) == 3


def test_either_side_has_a_row_at_least_and_max_mib_leaves_two(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TEXTS)
    for fraction in (1e-9, 1 - 1e-9):
        config = hf_config(tmp_path, str(tmp_path / "a.parquet"), max_mib=1e-6)
        config.valid_fraction = fraction
        corpus = hf_corpus(config)
        assert sorted(contents(corpus.train) + contents(corpus.valid)) == sorted(TEXTS[:2])
        assert len(corpus.train) == len(corpus.valid) == 1


def test_files_have_parts_of_a_split_too_and_one_row_is_enough_to_train(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TEXTS)
    config = hf_config(tmp_path, str(tmp_path / "a.parquet"), train_split="train[:1]", valid_split="train[50%:]")
    assert contents(hf_corpus(config).train) == TEXTS[:1]
    assert contents(hf_corpus(config).valid) == TEXTS[30:]


def test_the_library_is_asked_for_what_the_keys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # takes seconds

    asked: dict[str, Any] = {}

    def note(**keys: Any) -> None:
        asked.update(keys)
        raise OSError("no way")

    monkeypatch.setattr("datasets.load_dataset", note)
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_info()
    hf = HFConfig(name="a/b", subset="c", revision="v1", train_split="most")
    with pytest.raises(DataError, match=r"^data\.hf\.name=a/b: split most cannot be loaded \(no way\); repair it"):
        hf_corpus(DataConfig(source="hf", hf=hf, cache_dir=str(tmp_path)))
    assert asked == {
        "path": "a/b", "name": "c", "revision": "v1", "split": "most", "streaming": False,
        "cache_dir": str(tmp_path / "huggingface"),
    }  # fmt: skip
    # Every rank of a training loads it: nothing is drawn, and errors are said once.
    assert datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == logging.CRITICAL


def test_prepared_tokens_are_the_rows_each_closed_by_an_end(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [TEXTS[0], None, "", TEXTS[1], TEXTS[2]])
    config = hf_config(tmp_path, str(tmp_path / "a.parquet"))
    folder = prepare(config, tmp_path / "prepared", silent)
    data = build_data(DataConfig(source="tokens", files=[str(folder)]), 4, silent)
    assert build_data(config, 4, silent).fingerprint == data.fingerprint
    found = bytes(i if i < 256 else 0 for i in [*data.train.tokens, *data.valid.tokens]).decode().split("\0")
    assert sorted(found) == sorted(["", "", "", *TEXTS[:3]])


def test_equal_texts_are_on_one_side(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", TEXTS + TEXTS)
    corpus = hf_corpus(hf_config(tmp_path, str(tmp_path / "a.parquet")))
    assert not set(contents(corpus.train)) & set(contents(corpus.valid))
    assert len(corpus.train) + len(corpus.valid) == 120


@pytest.mark.parametrize(
    ("hf", "message"),
    [
        ({"text_key": "body"}, r"data\.hf\.text_key=body: no such column; use one of id, text"),
        ({"text_key": "id"}, r"data\.hf\.text_key=id: holds int, not text"),
        ({"train_split": "validation"}, r"split validation cannot be loaded .* correct the split"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, hf: dict, message: str) -> None:
    write(tmp_path / "set" / "train.parquet", TEXTS)
    with pytest.raises(DataError, match=message):
        hf_corpus(hf_config(tmp_path, str(tmp_path / "set"), **hf))


def test_files_that_are_no_data_set_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"^data\.files=.*a\.parquet: split train cannot be loaded \(.*\); repair it"):
        hf_corpus(hf_config(tmp_path, str(tmp_path / "a.parquet")))
    (tmp_path / "a.jsonl").write_text("[")
    with pytest.raises(DataError, match=r"cannot be loaded \((?!An error occurred while generating)"):
        hf_corpus(hf_config(tmp_path, str(tmp_path / "a.jsonl")))
    with pytest.raises(DataError, match=r"missing\.parquet: no such file"):
        hf_corpus(hf_config(tmp_path, str(tmp_path / "missing.parquet")))
    write(tmp_path / "one.parquet", TEXTS[:1])
    with pytest.raises(DataError, match=r"1 rows cannot be split; set data\.hf\.valid_split"):
        hf_corpus(hf_config(tmp_path, str(tmp_path / "one.parquet")))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "hf"}, "data.hf is not set"),
        ({"source": "text", "files": "a", "hf": HFConfig()}, "data.hf has no use with data.source=text"),
        ({"source": "hf", "hf": HFConfig()}, "either files or the name"),
        ({"source": "hf", "files": "a", "hf": HFConfig(name="b")}, "either files or the name"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"revision": "main"}, "data.hf.revision=main"), ({"valid_split": "train"}, "training split too")],
)
def test_keys_of_the_group_that_do_not_fit_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HFConfig(**keys)
