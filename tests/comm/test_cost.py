"""The cost model against formulas written apart from it, its file, its probe, and what auto makes of it."""

import json
import math
import time
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.reference import make_case, run_layer
from tests.distributed import run_distributed
from twohop.comm import AutoOptions, CostModel, Topology, build_dispatcher, fit_cost_model
from twohop.comm.cost import LevelCost, Workload, distinct_subtrees, traffic_of_hop
from twohop.comm.routes import ROUTES

BLOCK = [("node", 2), ("local", 4)]
FREE = LevelCost(message_s=0, byte_s=0)
NO_BASE = dict.fromkeys(ROUTES, 0.0)


def work(tokens: int = 512, top_k: int = 8, experts: int = 64, row: float = 2048) -> Workload:
    return Workload(tokens, top_k, experts, row, row, row)


@pytest.mark.parametrize(
    ("experts", "top_k", "nodes", "factor"),
    [(8, 2, 2, 1.27), (8, 2, 4, 1.08), (8, 2, 8, 1.00), (64, 8, 2, 4.01), (64, 8, 4, 2.19), (64, 8, 8, 1.47),
     (64, 8, 16, 1.19), (256, 8, 2, 4.01), (256, 8, 4, 2.21), (256, 8, 8, 1.51), (256, 8, 16, 1.23)],
)  # fmt: skip
def test_deduplication_factor_is_the_published_one(experts: int, top_k: int, nodes: int, factor: float) -> None:
    distinct = distinct_subtrees(work(top_k=top_k, experts=experts), [("node", nodes)])
    assert top_k / distinct == pytest.approx(factor, abs=0.006)


def test_distinct_subtrees_is_the_mean_over_all_choices() -> None:
    choices = list(combinations(range(8), 3))
    mean = sum(len({e // 2 for e in chosen}) for chosen in choices) / len(choices)
    assert distinct_subtrees(work(top_k=3, experts=8), [("node", 2), ("local", 2)]) == pytest.approx(mean)


def test_messages_and_shares_of_an_exchange() -> None:
    """2 nodes x 4 ranks: flat has L(M-1) = 4 peers on the other node and 3 on its own; the rail has 1."""
    assert traffic_of_hop(BLOCK, (0, 1)) == [("node", 4, 0.5), ("local", 3, 3 / 8)]
    assert traffic_of_hop(BLOCK, (0,)) == [("node", 1, 0.5)]
    assert traffic_of_hop(BLOCK, (1,)) == [("local", 3, 0.75)]
    three = [("rack", 2), ("node", 2), ("local", 2)]
    assert traffic_of_hop(three, (0, 1, 2)) == [("rack", 4, 0.5), ("node", 2, 0.25), ("local", 1, 0.125)]


def test_bytes_between_nodes_are_the_only_cost() -> None:
    model = CostModel({"node": LevelCost(0, 1e-9), "local": FREE}, 0, 0, NO_BASE)
    node = distinct_subtrees(work(), BLOCK[:1])
    rank = distinct_subtrees(work(), BLOCK)
    assert model.predict(work(), BLOCK, "dedup", 1) == pytest.approx(2 * 512 * node * 0.5 * 2048e-9)
    for algorithm in ("flat", "hierarchical"):
        assert model.predict(work(), BLOCK, algorithm, 4) == pytest.approx(2 * 512 * rank * 0.5 * 2048e-9)


def test_what_flat_sends_inside_a_node_has_the_format_of_what_leaves_it() -> None:
    """3 of 8 rows go to the same node: narrow beside others, and as wide as ever where no axis leaves the node."""
    model = CostModel({"node": FREE, "local": LevelCost(0, 1e-9)}, 0, 0, NO_BASE)
    narrow = Workload(512, 8, 64, row_bytes=2048, between_row_bytes=1024, inside_row_bytes=2048)
    rank = distinct_subtrees(narrow, BLOCK)
    assert model.predict(narrow, BLOCK, "flat", 1) == pytest.approx(2 * 512 * rank * 3 / 8 * 1024e-9)
    assert model.predict(narrow, BLOCK, "hierarchical", 1) == pytest.approx(2 * 512 * rank * 3 / 4 * 2048e-9)
    alone = distinct_subtrees(narrow, BLOCK[1:])
    assert model.predict(narrow, BLOCK[1:], "flat", 1) == pytest.approx(2 * 512 * alone * 3 / 4 * 2048e-9)


def test_chunks_hide_the_shorter_resources_and_cost_messages() -> None:
    base = {"flat": 1e-3, "hierarchical": 3e-3, "dedup": 2e-3}
    model = CostModel({"node": LevelCost(1e-4, 1e-8), "local": LevelCost(1e-5, 1e-9)}, 1e-10, 1e-5, base)
    node, rank = distinct_subtrees(work(), BLOCK[:1]), distinct_subtrees(work(), BLOCK)
    for chunks in (1, 4):
        between = 2 * (512 * node * 0.5 * 2048 * 1e-8 + (chunks - 1) * 1 * 1e-4)
        inside = 2 * (512 * rank * 0.75 * 2048 * 1e-9 + (chunks - 1) * 3 * 1e-5)
        processor = 2 * 512 * 2048 * (8 + node + rank) * 1e-10 + 2 * 2 * (chunks - 1) * 1e-5
        assert between > inside > processor
        expected = 2e-3 + between + (inside + processor) / chunks
        assert model.predict(work(), BLOCK, "dedup", chunks) == pytest.approx(expected)


def test_one_process_costs_copies_alone() -> None:
    model = CostModel({}, 1e-10, 1, NO_BASE)
    assert model.predict(work(), [("node", 1), ("local", 1)], "dedup", 1) == pytest.approx(2 * 512 * 8 * 2048e-10)


def test_choice_is_the_smallest_prediction() -> None:
    base = {"flat": 1e-3, "hierarchical": 3e-3, "dedup": 2e-3}
    model = CostModel({"node": LevelCost(1e-3, 1e-8), "local": LevelCost(1e-5, 1e-9)}, 1e-10, 1e-4, base)
    ways = {(a, c): model.predict(work(), BLOCK, a, c) for a, c in product(ROUTES, (1, 2, 8))}
    choice = model.choose(work(), BLOCK, ROUTES, (1, 2, 8))
    assert ways[choice.algorithm, choice.chunks] == choice.seconds == min(ways.values())


def test_file_brings_the_model_back(tmp_path: Path) -> None:
    model = CostModel({"node": LevelCost(1e-4, 1e-8)}, 1e-10, 1e-5, dict.fromkeys(ROUTES, 1e-3))
    model.save(tmp_path / "new" / "cost.json")
    assert CostModel.load(tmp_path / "new" / "cost.json") == model


@pytest.mark.parametrize("damage", ["missing", "not json", "a list", "lacks a key", "negative", "nan"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cost.json"
    values: dict[str, Any] = {"levels": {}, "copied_byte_s": 1e-9, "exchange_s": 1e-5, "base_s": dict(NO_BASE)}
    if damage == "lacks a key":
        del values["base_s"]["dedup"]
    if damage in ("negative", "nan"):
        values["base_s"]["flat"] = -1.0 if damage == "negative" else math.nan
    text = {"not json": "{", "a list": "[]"}.get(damage, json.dumps(values))
    if damage != "missing":
        path.write_text(text)
    with pytest.raises(ValueError, match=r"cost file .*cost\.json"):
        CostModel.load(path)


def probe_on_this_rank() -> tuple[CostModel, float]:
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    started = time.perf_counter()
    return fit_cost_model(topology), time.perf_counter() - started


def test_probe_gives_all_ranks_the_same_model() -> None:
    models = [model for model, _ in run_distributed(probe_on_this_rank, 4)]
    assert len(set(map(repr, models))) == 1
    assert set(models[0].levels) == {"node", "local"}
    assert models[0].copied_byte_s > 0
    assert all(seconds > 0 for seconds in models[0].base_s.values())


def auto_on_this_rank(case: list[Any], later: list[Any]) -> dict[str, Any]:
    """Fast links inside, a slow network with costly messages: dedup, and more chunks for more tokens."""
    model = CostModel({"node": LevelCost(1e-4, 1e-6), "local": LevelCost(1e-6, 1e-7)}, 1e-10, 1e-6, NO_BASE)
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    options = AutoOptions(model, chunks=(1, 2, 4))
    dispatcher = build_dispatcher("auto", topology, 8, auto=options)
    x_ND, ids_NK, weights_NK, _ = case[topology.rank]
    ways = []
    for x, ids, weights in [(x_ND, ids_NK, weights_NK)] * 2 + [later[topology.rank][:3]] * 2:
        dispatcher.run(x, ids, weights, lambda rows, counts: rows)
        way = dispatcher.way(x, ids)
        ways.append((way.name, way.chunks))
    result = run_layer(topology, "auto", case, 8, auto=options)
    fixed = run_layer(topology, "flat", case, 8)
    return {"ways": ways, "equal": torch.equal(result["y"], fixed["y"]) and torch.equal(result["x"], fixed["x"])}


def test_auto_chooses_alike_on_all_ranks_and_again_when_shapes_change() -> None:
    small = make_case(1, [1, 0, 2, 1], 4, 8, 8, torch.float32)
    large = make_case(2, [300, 20, 0, 90], 4, 8, 8, torch.float32)
    results = run_distributed(auto_on_this_rank, 4, small, large)
    assert all(result["equal"] for result in results)
    assert len({str(result["ways"]) for result in results}) == 1
    first, second, third, fourth = results[0]["ways"]
    assert first == second
    assert third == fourth == ("dedup", 4)
    assert second[1] < 4


def test_auto_may_choose_a_format_when_allowed() -> None:
    model = CostModel({"node": LevelCost(0, 1e-6), "local": FREE}, 0, 0, NO_BASE)
    names = run_distributed(formats_on_this_rank, 2, model)
    assert names == [("fp32", "fp8")] * 2


def formats_on_this_rank(model: CostModel) -> tuple[str, str]:
    topology = Topology.discover(ranks_per_node=1, timeout_s=20)
    x_ND, ids_NK = torch.ones(4, 64), torch.zeros(4, 1, dtype=torch.long)
    names = []
    for allowed in ((), ("fp32", "bf16", "fp8")):
        options = AutoOptions(model, tokens=4, between_wires=allowed)
        names.append(build_dispatcher("auto", topology, 2, auto=options).way(x_ND, ids_NK).wires.dispatch.between)
    assert dist.is_initialized()
    return names[0], names[1]


def test_auto_needs_its_options() -> None:
    with pytest.raises(ValueError, match="auto needs AutoOptions"):
        build_dispatcher("auto", Topology.discover(), 4)
