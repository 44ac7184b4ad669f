"""The benchmarks: the rivals are right and send what they are known to send; results are written, drawn and printed."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from twohop.comm import Topology, TrafficMeter, build_dispatcher

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import common  # noqa: E402
import plot_dispatch  # noqa: E402
import rivals  # noqa: E402

CASES = [common.Case(16, 2), common.Case(11, 8, 4.0), common.Case(1, 1)]
ROW_BYTES = common.DIM * 4


def rivals_on_this_rank() -> list[dict[str, tuple[int, int]]]:
    """For each case and rival, after a check against the dense reference: rows' bytes and messages between nodes."""
    topology, meter = Topology.discover(ranks_per_node=2, timeout_s=20), TrafficMeter()
    sent: list[dict[str, tuple[int, int]]] = []
    for case in CASES:
        data = common.Data.make(case, topology.rank)
        sent.append({})
        for name, forward in rivals.Rivals(topology, meter, common.scales()).forwards().items():
            meter.reset()
            common.time_once(forward, data, common.dense_reference(data))
            sent[-1][name] = tuple(f("between nodes", "rows") for f in (meter.bytes_sent, meter.messages_sent))
    return sent


def test_rivals_are_right_and_send_what_they_are_known_to_send() -> None:
    results = run_distributed(rivals_on_this_rank, 4)
    for i, case in enumerate(CASES):
        total = {name: sum(results[rank][i][name][0] for rank in range(4)) for name in results[0][i]}
        ids = [case.ids(rank) for rank in range(4)]
        foreign = sum(int((nodes != rank // 2).sum()) for rank, nodes in enumerate(id_NK // 32 for id_NK in ids))
        largest = max(int(id_NK.flatten().bincount().max()) for id_NK in ids)
        # There and home, forward and backward; padded: 4 ranks send half their E·B rows to the other node.
        assert total["copy per expert"] == total["gather-leader-scatter"] == 4 * foreign * ROW_BYTES
        assert total["padded"] == total["padded, two-level"] == 4 * 4 * 32 * largest * ROW_BYTES
        for rank in range(4):
            messages = {name: results[rank][i][name][1] for name in results[rank][i]}
            assert messages["padded"] == 2 * messages["padded, two-level"] == 8
            assert messages["gather-leader-scatter"] == (4 if rank % 2 == 0 else 0)


def right(x_ND: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nd,nk,nkd->nd", x_ND, weights_NK, common.scales()[ids_NK])


def test_a_wrong_output_and_a_wrong_gradient_are_found(world_of_one: None) -> None:
    data = common.Data.make(CASES[0], 0)
    expected = common.dense_reference(data)
    forward_s, both_s = common.time_once(right, data, expected)
    assert 0 < forward_s < both_s
    for wrong in (
        lambda x, ids, w: right(x, (ids + 1) % 64, w),
        lambda x, ids, w: right(x.detach(), ids, w) + 0 * x,
        lambda x, ids, w: right(x, ids, w.detach()) + 0 * w.sum(),
    ):
        with pytest.raises(AssertionError, match="not close"):
            common.time_once(wrong, data, expected)


def limit_on_this_rank(case: Any) -> tuple[int, int]:
    topology, meter = Topology.discover(ranks_per_node=2, timeout_s=20), TrafficMeter()
    dispatcher = build_dispatcher("dedup", topology, common.NUM_EXPERTS, meter=meter)
    data = common.Data.make(case, topology.rank)
    dispatcher.run(data.x_ND, data.ids_NK, data.weights_NK, lambda rows, counts: rows)
    return meter.bytes_sent("between nodes", "dispatch", "combine"), common.bytes_leaving_node(case, topology)


@pytest.mark.parametrize("skew", [1.0, 4.0])
def test_link_limit_is_what_dedup_sends(skew: float) -> None:
    results = run_distributed(limit_on_this_rank, 4, common.Case(40, 2, skew))
    per_node = [sum(sent for sent, _ in results[node : node + 2]) for node in (0, 2)]
    assert all(limit == max(per_node) for _, limit in results)


@pytest.mark.parametrize(("k", "skew"), [(2, 1.0), (8, 1.0), (8, 4.0)])
def test_the_hottest_expert_has_its_share(k: int, skew: float) -> None:
    ids_NK = common.Case(20_000, k, skew).ids(0)
    share_E = ids_NK.flatten().bincount(minlength=64) / ids_NK.numel() * 64
    assert share_E[0] == pytest.approx(skew, rel=0.1)
    assert share_E[1:].max() < 1.2
    assert all(len(set(ids)) == k for ids in ids_NK[:100].tolist())


@pytest.mark.parametrize("text", ["8", "8:64", "0:2", "8:2:40", "8:2:-1", "a:b"])
def test_a_bad_case_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        common.Case.parse(text)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    common.dist.init_process_group("gloo", store=common.dist.HashStore(), rank=0, world_size=1)
    yield
    common.dist.destroy_process_group()


def test_rounds_stop_when_the_time_is_up(world_of_one: None) -> None:
    calls: list[str] = []

    def measure(name: str) -> tuple[float, ...]:
        calls.append(name)
        return (float(len(calls)),)

    measures = {name: partial(measure, name) for name in "ab"}
    times = common.in_turn(measures, 3)
    assert times == {"a": [(1.0,), (3.0,), (5.0,)], "b": [(2.0,), (4.0,), (6.0,)]}
    assert common.medians(times["b"]) == (4.0,)
    assert calls == list("ababab")
    calls.clear()
    assert common.in_turn(measures, 3, 0.0) == {"a": [(1.0,)], "b": [(2.0,)]}


def main_on_this_rank(script: str, arguments: list[str]) -> str:
    """What a benchmark prints."""
    sys.argv = [script, *arguments]
    with redirect_stdout(StringIO()) as printed:
        importlib.import_module(script).main()
    return printed.getvalue()


def bench(script: str, *arguments: str) -> str:
    """Run a benchmark on 2 nodes × 2 ranks, as under torchrun; what rank 0 prints."""
    place = ["--ranks-per-node", "2", "--rounds", "1", *arguments]
    printed, *others = run_distributed(main_on_this_rank, 4, script, place, init=False, timeout=120, keep=False)
    assert others == [""] * 3
    return printed


def test_results_are_printed_written_and_drawn(tmp_path: Path) -> None:
    answer, picture = tmp_path / "answer.json", tmp_path / "picture.svg"
    printed = bench("dispatch", "--rate", "100mbit", "--json", str(answer), "--cases", "8:2", "16:2", "16:2:4")
    assert "16 tokens per rank, K=2, hottest expert 4 x (medians of 1)" in printed
    result = json.loads(answer.read_text())
    case = result["cases"][0]
    assert (result["rate_bits_per_s"], case["tokens"], len(case["variants"])) == (100_000_000, 8, 10)
    assert all(0 < row["forward_s"] <= row["forward_backward_s"] for c in result["cases"] for row in c["variants"])
    layers = {row["name"] for row in result["layers"]["variants"]} | set(result["layers"]["skipped"])
    assert layers == {"deepspeed.moe.layer.MoE", "our layer, flat", "our layer, dedup"}

    plot_dispatch.draw(result, picture)
    assert all(word in picture.read_text() for word in ("link limit", "size, K = 2", "skew, K = 2, 16 tokens", "dedup"))
    assert picture.stat().st_size < 100_000
    lines = plot_dispatch.markdown(result).splitlines()
    assert lines[0] == "| ms: forward / forward + backward | 8 tokens, K=2 | 16 tokens, K=2 | 16 tokens, K=2, hot ×4 |"
    assert lines[2].startswith("| link limit | ")
    assert sum(line.startswith("| dedup, 8 chunks | ") for line in lines) == 2


def test_overlap_is_measured(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    bench("overlap", "--rate", "10gbit", "--json", str(answer), "--chunks", "1", "4", "--compute", "8")
    measured = json.loads(answer.read_text())["seconds"]
    assert set(measured) == {"experts alone"} | {
        f"{what}, {c}" for what in ("dedup alone", "with experts") for c in (1, 4)
    }


def test_what_a_cached_plan_saves_is_measured(tmp_path: Path) -> None:
    answer = tmp_path / "answer.json"
    printed = bench("cached", "--ffn-dim", "16", "--json", str(answer), "--cases", "8:2")
    assert "8 tokens, K=2" in printed
    flat, dedup = json.loads(answer.read_text())["cases"]
    assert (flat["way"], dedup["way"]) == ("flat", "dedup")
    assert all(0 < forward <= both for case in (flat, dedup) for forward, both in (case["live"], case["cached"]))
    assert 0 < flat["plan_bytes"] < dedup["plan_bytes"]


def join_on_this_rank() -> str:
    with pytest.raises(SystemExit) as end:
        common.join_cluster(ranks_per_node=None)
    return str(end.value)


def test_one_node_is_refused() -> None:
    for message in run_distributed(join_on_this_rank, 2, init=False):
        assert message.startswith("(1, 2) (nodes, ranks per node): at least 2 of both are needed")
