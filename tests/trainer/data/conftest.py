from pathlib import Path

import pytest

from tests.trainer.data.texts import POEM


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small text files, of which no two are equal."""
    root = tmp_path / "texts"
    for i in range(40):
        file = root / f"part{i % 3}" / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {i}\n" + POEM * (i + 1))
    return root
