"""The check of the simulator against emulated clusters: what it fits, where the truth is known."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "bench" / "plan_check.py"
    spec = importlib.util.spec_from_file_location("plan_check", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def places(script: ModuleType, nodes: int, ranks: int, rate: int, values: list[float]) -> list[dict[str, Any]]:
    """Made up of `values`, in place of what a cluster measures."""
    found = [
        {"tokens": tokens, "top_k": 2, "dim": 64, "algorithm": algorithm, "chunks": chunks,
         "nodes": nodes, "ranks": ranks, "rate": rate}
        for tokens in (16, 256) for algorithm in ("flat", "dedup") for chunks in (1, 4)
    ]  # fmt: skip
    return [place | {"measured_s": script.predict(place, values)} for place in found]


def test_fit_predicts_clusters_it_has_not_seen(script: ModuleType) -> None:
    truth = [3 * value for value in script.FITTED.values()]
    values = script.fit(places(script, 2, 2, 100, truth))
    for place in places(script, 2, 3, 200, truth):
        assert script.predict(place, values) == pytest.approx(place["measured_s"], rel=0.1)


def test_the_rate_of_the_links_is_the_nominal_one(script: ModuleType) -> None:
    network = script.network(200, list(script.FITTED.values()))
    assert network.between.byte_s == pytest.approx(8 / 200e6)
    assert network.nics == 1
    assert network.copied_byte_s == script.FITTED["copied_byte_s"]
    assert network.inside.send_s == script.FITTED["inside.send_s"]
