"""The check of the simulator against emulated clusters: what it fits, where the truth is known."""

import importlib.util
import json
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
         "nodes": nodes, "ranks": ranks, "rate": rate, "link_byte_s": 9e-6 / rate}
        for tokens in (16, 256) for algorithm in ("flat", "dedup") for chunks in (2,)
    ]  # fmt: skip
    return [place | {"measured_s": script.predict(place, values)} for place in found]


def test_fit_predicts_clusters_it_has_not_seen(script: ModuleType) -> None:
    truth = [3 * value for value in script.FITTED.values()]
    values = script.fit(places(script, 2, 2, 100, truth))
    for place in places(script, 2, 3, 200, truth):
        assert script.predict(place, values) == pytest.approx(place["measured_s"], rel=0.1)


def test_links_are_as_probed_and_processors_are_shared(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.os, "sched_getaffinity", lambda _: {0, 1})
    place = {"nodes": 2, "ranks": 3, "rate": 200, "link_byte_s": 5e-8}
    values = list(script.FITTED.values())
    network = script.network(place, values)
    assert network.between.byte_s == 5e-8
    assert script.network(place | {"link_byte_s": 3e-8}, values).between.byte_s == pytest.approx(8 / 200e6)
    assert network.nics == 1
    assert network.one_thread
    for processors, ranks in ((3, 6), (1, 2), (1, 1)):  # ranks to each processor
        network = script.network(place | {"nodes": 1, "ranks": ranks}, values)
        assert network.copied_byte_s == pytest.approx(processors * script.FITTED["copied_byte_s"])
        assert network.inside.send_s == pytest.approx(processors * script.FITTED["inside.send_s"])
        assert network.plan_s == pytest.approx(processors * script.FITTED["plan_s"])
        assert network.between.latency_s == script.FITTED["between.latency_s"]


def test_what_is_held_out_is_fitted_nowhere(script: ModuleType) -> None:
    """No cluster is in both, nor a number of tokens, and of each shape some K is new."""
    clusters = [{(s.nodes, s.ranks, s.rate_mbit) for s in settings} for settings in (script.FIT, script.HELD_OUT)]
    assert not clusters[0] & clusters[1]
    tokens = [{n for s in settings for n in s.tokens} for settings in (script.FIT, script.HELD_OUT)]
    assert not tokens[0] & tokens[1]
    for held in script.HELD_OUT:
        fitted = {k for s in script.FIT if (s.nodes, s.ranks) == (held.nodes, held.ranks) for k in s.top_k}
        assert set(held.top_k) - fitted


def test_measured_places_bring_the_link_that_was_probed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(command: list[str], **_: object) -> None:
        out = Path(next(word for word in map(str, command) if word.startswith("json="))[len("json=") :])
        model = {"levels": {"node": {"byte_s": 6e-8}}}
        out.write_text(json.dumps({"model": model, "timings": [{"tokens": 16}]}))

    monkeypatch.setattr(script.subprocess, "run", bench)
    (place,) = script.measure(script.Setting(4, 2, 200, (16,), (2,)), 1)
    assert place == {"tokens": 16, "nodes": 4, "ranks": 2, "rate": 200, "link_byte_s": pytest.approx(3e-8)}
