"""What CONTRIBUTING.md adds, as if it were there."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import ROOT, in_module_of, snippet
from twohop.comm.routes import ROUTES
from twohop.comm.wire import FORMATS
from twohop.models.attention.masks import PATTERNS
from twohop.models.config.attention import OPTIONS
from twohop.models.interop import FAMILIES
from twohop.models.routers import ROUTERS
from twohop.trainer.data.build import CORPORA
from twohop.trainer.engines import ENGINES
from twohop.trainer.trackers import TRACKERS


def example(file: str) -> dict[str, Any]:
    """The names that CONTRIBUTING.md's code for a file defines there."""
    code = compile(snippet("CONTRIBUTING.md", file), file, "exec")
    names = in_module_of(file) if (ROOT / file).exists() else {"__name__": f"example.{Path(file).stem}"}
    exec(code, names)
    return names


def entry(file: str, names: dict[str, Any]) -> dict[str, Any]:
    """The line that CONTRIBUTING.md adds to a dictionary in that file, as a dictionary."""
    return eval("{" + snippet("CONTRIBUTING.md", file) + "}", in_module_of(file) | names)


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """Its lines in the registries."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        yield


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {
        "models/routers/__init__.py": (ROUTERS, example("models/routers/cosine.py")),
        "models/attention/masks.py": (PATTERNS, {}),
        "models/config/attention.py": (OPTIONS, {}),
        "models/interop/__init__.py": (FAMILIES, example("models/interop/mistral.py")),
        "comm/wire.py": (FORMATS, {}),
        "trainer/engines/__init__.py": (ENGINES, example("trainer/engines/single.py")),
        "trainer/trackers/__init__.py": (TRACKERS, {"__name__": "example.trackers"}),
        "trainer/data/build.py": (CORPORA, example("trainer/data/corpus.py")),
    }
    for file, (registry, names) in added.items():
        for key, value in entry(file, names).items():
            monkeypatch.setitem(registry, key, value)
    monkeypatch.setitem(ROUTES, "outwards", example("comm/routes.py")["outwards"])
    tracker = ModuleType("example.trackers.table")
    exec(snippet("CONTRIBUTING.md", "trainer/trackers/table.py"), vars(tracker))
    monkeypatch.setitem(sys.modules, tracker.__name__, tracker)
