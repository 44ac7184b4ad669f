"""The documents, and the code and commands on them."""

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def snippet(page: str, file: str) -> str:
    """The python block of a page that begins with `# file`, the file where it would stand, without this line."""
    (code,) = [b for b in blocks(ROOT / page, "python") if b.startswith(f"# {file}\n")]
    return code.split("\n", 1)[1]


def in_module_of(file: str) -> dict[str, Any]:
    """What a function added to that file could use."""
    name = "twohop." + file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    return dict(vars(importlib.import_module(name)))
