"""Texts and settings that the tests of data share."""

from pathlib import Path
from typing import Any

from twohop.trainer.config import DataConfig, TokenizerConfig, TokenizerKind

BPE = TokenizerConfig(kind=TokenizerKind.bpe, vocab_size=300)
POEM = "Größe – ein Wort, zwei Hops: 速い道 🚀\n"


def silent(_: str) -> None:
    pass


def text_config(tmp_path: Path, *files: Path | str, **kwargs: Any) -> DataConfig:
    return DataConfig(source="text", files=[str(f) for f in files], cache_dir=str(tmp_path / "cache"), **kwargs)


def texts(documents: Any) -> dict[str, str]:
    return {f"{d.name}[{d.start}]": "".join(d.blocks()) for d in documents}
