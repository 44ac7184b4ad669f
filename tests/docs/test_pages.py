"""Links lead somewhere, names are of files, and pictures and tables are what the code says."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from tests.docs.pages import PAGES, ROOT
from twohop.comm.cost import Workload, distinct_subtrees
from twohop.comm.wire import FORMATS


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    folders = "comm|models|trainer|configs|scripts|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", prose):
        assert (ROOT / path).exists(), path


def test_pictures_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "pictures")
    pictures = importlib.import_module("draw").PICTURES
    for name, draw in pictures.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == draw().svg(), f"{name}: run draw.py again"
    shown = {name for page in PAGES for name in re.findall(r"pictures/(\w+)\.svg", page.read_text())}
    assert shown >= set(pictures)


def rows_of_tables(first_cell: str) -> list[tuple[str, list[str]]]:
    """(first cell, other cells) of every table row of docs/communication.md that begins with a match."""
    page = (ROOT / "docs" / "communication.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [(cells[0], cells[1:]) for cells in rows if re.fullmatch(first_cell, cells[0])]


def test_savings_of_deduplication_are_as_computed() -> None:
    tables = rows_of_tables(r"\d+, \d+")
    assert len(tables) == 5
    for i, (sizes, cells) in enumerate(tables):
        num_experts, top_k = map(int, sizes.split(", "))
        work = Workload(1, top_k, num_experts, 0, 0, 0)
        for nodes, cell in zip((2, 4, 8, 16), cells, strict=True):
            against_flat = i >= 3
            parts = [("node", nodes)] + [("local", 8)] * against_flat
            if num_experts % math.prod(size for _, size in parts):
                assert cell == "–"
                continue
            copies = distinct_subtrees(work, parts) if against_flat else top_k
            assert cell == f"{copies / distinct_subtrees(work, parts[:1]):.2f}"


def test_sizes_and_errors_of_wire_formats_are_as_computed() -> None:
    x_RD = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    rows = {name.strip("`"): cells for name, cells in rows_of_tables("`(fp|bf|int).*`")}
    assert set(rows) == set(FORMATS)
    for name, (row_bytes, _, error) in rows.items():
        wire = FORMATS[name]
        assert row_bytes == f"{wire.row_bytes(512, torch.float32):,}"
        measured = (wire.decode(wire.encode(x_RD), torch.float32) - x_RD).square().mean().sqrt() * 100
        assert error == ("0" if measured == 0 else f"{measured:.2g} %")
