"""Errors name key or file, value and cure."""

from pathlib import Path

import pytest

from tests.trainer.data.texts import BPE, silent, text_config
from twohop.trainer.config import TokenizerConfig, TokenizerKind
from twohop.trainer.data import (
    build_data,
    load_tokenizer,
    prepare,
)
from twohop.trainer.errors import DataError


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
        (
            {"tokenizer": TokenizerConfig(kind=TokenizerKind.file, file=__file__)},
            "test_bad_input.py: not a tokenizer.json",
        ),
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
    with pytest.raises(DataError, match=r"texts/valid\.json: no such file"):
        prepare(text_config(tmp_path, folder), folder, silent)
    assert load_tokenizer(made).vocab_size == 257
