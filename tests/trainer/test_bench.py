"""`twohop bench dispatch`: it times every way, keeps what it measured, and refuses what it cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed
from twohop.comm import CostModel
from twohop.trainer.bench import bench_dispatch
from twohop.trainer.cli import run
from twohop.trainer.config import BenchConfig
from twohop.trainer.errors import ConfigError


def bench_on_this_rank(options: dict[str, Any]) -> dict[str, Any]:
    return bench_dispatch(BenchConfig(**options), None)


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    grid = {"tokens": [8, 16], "top_k": [2], "dim": [32], "experts": 8, "chunks": [1, 2], "repeats": 2}
    return grid | {"ranks_per_node": 2, "json": str(folder / "new" / "bench.json"), "timeout_s": 30.0} | changes


@pytest.mark.parametrize("backward", [False, True])
def test_every_way_is_timed_at_every_size(tmp_path: Path, backward: bool) -> None:
    options = small(tmp_path, backward=backward, save_cost_file=str(tmp_path / "cost.json"))
    result, *others = run_distributed(bench_on_this_rank, 4, options, init=False)
    assert others == [{}, {}, {}]
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    ways = [(t["tokens"], t["algorithm"], t["chunks"]) for t in written["timings"]]
    algorithms = ("flat", "hierarchical", "dedup")
    assert ways == [(n, name, chunks) for n in (8, 16) for name in algorithms for chunks in (1, 2)]
    assert all(t["measured_s"] > 0 and t["predicted_s"] > 0 for t in written["timings"])
    assert len(written["regrets"]) == 2
    assert min(written["regrets"]) >= 0
    assert result["largest_regret"] == max(written["regrets"])
    sent = {(t["tokens"], t["algorithm"], t["chunks"]): t["between_nodes_bytes"] for t in written["timings"]}
    assert sent[16, "dedup", 1] < sent[16, "flat", 1]
    assert CostModel.load(tmp_path / "cost.json").levels.keys() == {"node", "local"}


def test_a_kept_model_predicts_without_a_probe(tmp_path: Path) -> None:
    CostModel({}, copied_byte_s=1.0, exchange_s=0.0, base_s={"flat": 0, "hierarchical": 0, "dedup": 0}).save(
        tmp_path / "cost.json"
    )
    options = small(tmp_path, cost_file=str(tmp_path / "cost.json"), ranks_per_node=None)
    bench_dispatch(BenchConfig(**options), None)
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert written["timings"][0]["predicted_s"] == pytest.approx(2 * 8 * 2 * 32 * 4)  # there and back, N, K, D, fp32


def test_experts_must_be_shared_evenly(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experts=6 cannot be shared by 4 ranks: use a multiple"):
        run_distributed(bench_on_this_rank, 4, small(tmp_path, experts=6), init=False)


def test_damaged_cost_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cost file .*none\.json cannot be read"):
        bench_dispatch(BenchConfig(**small(tmp_path, cost_file=str(tmp_path / "none.json"), ranks_per_node=None)), None)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "twohop bench needs to know what to time: twohop bench dispatch"),
        (["dispach"], "twohop bench needs to know what to time"),
        (["dispatch", "algorithms=[flt]"], "algorithms contains 'flt', did you mean 'flat'?"),
        (["dispatch", "repeats=0"], "repeats=0: use a positive number"),
    ],
)
def test_bad_command_lines_are_refused(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *args]) == 2
    assert message in capsys.readouterr().err
