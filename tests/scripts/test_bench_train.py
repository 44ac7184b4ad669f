"""Training end to end: all sides compute the same, the floor is the step's arithmetic, and what is missing is named."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.distributed import run_distributed
from tests.tiny import write_corpus
from twohop.models.flops import training_flops
from twohop.trainer.config import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import train as bench  # noqa: E402
from step_floor import MatmulFloor  # noqa: E402

TINY = ("model.dim=16", "model.num_heads=2", "model.ffn_dim=32", "train.seq_len=16", "train.global_batch=8")


def config_of(case: str, folder: Path, processes: int, *overrides: str) -> Config:
    files = [f"data.files={folder / 'corpus.txt'}", f"data.cache_dir={folder / 'cache'}", "train.micro_batch=2"]
    few = ["train.steps=3", "comm.ranks_per_node=null"]
    return bench.compose(
        [*bench.CASES[case], *bench.COMMON, "data=text", *TINY, *files, *few, *overrides], processes, 1
    )


def take_part(config: Config, folder: Path) -> dict[str, Any]:
    import train_sides

    return train_sides.run(config, folder)


def losses(kind: str, config: Config, folder: Path, **options: Any) -> list[float]:
    """What the steps of a side give; `folder` is made."""
    folder.mkdir()
    told = {"side": kind, "expected": [], "tolerances": bench.TOLERANCES, **options}
    (folder / "side.json").write_text(json.dumps(told))
    keep = kind != "deepspeed"  # which leaves its groups behind
    result: list[float] = run_distributed(take_part, config.launch.nproc, config, folder, init=False, keep=keep)[0][
        "losses"
    ]
    return result


def test_transformers_trains_the_same_model(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    small = ("model.num_layers=2", "model.num_kv_heads=1", "model.moe.experts=4")
    config = config_of("mixtral", tmp_path, 1, *small)
    wanted = losses("ours", config, tmp_path / "ours")
    assert (
        len(losses("transformers", config, tmp_path / "hf", expected=wanted, experts="grouped_mm")) == len(wanted) == 3
    )


def test_deepspeed_trains_the_same_model(tmp_path: Path) -> None:
    """The quickstart with its residuals and router losses; dropless, since at a capacity it drops other tokens."""
    write_corpus(tmp_path)
    dropless = ("model.num_layers=4", "model.moe.capacity_factor=null")
    config = config_of("quickstart", tmp_path, 2, *dropless)
    wanted = losses("ours", config, tmp_path / "ours")
    assert len(losses("deepspeed", config, tmp_path / "deepspeed", expected=wanted)) == len(wanted) == 3


def test_a_side_that_computes_something_else_ends() -> None:
    import train_sides

    watch = train_sides.Stopwatch({"expected": [5.0, 4.0], "tolerances": [1e-5, 1e-3]})
    watch.lap(5.00001)
    with pytest.raises(AssertionError, match=r"step 2: loss 4\.01, not 4\.0"):
        watch.lap(4.01)


@pytest.mark.parametrize("case", ["mixtral", "quickstart"])
def test_the_floor_is_the_arithmetic_of_the_step(case: str, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    config = config_of(case, tmp_path, 1)
    config.model.vocab_size = 257
    with FlopCounterMode(display=False) as counter:
        MatmulFloor(config, kept=1.0).run()
    model, train = config.model, config.train
    needed = training_flops(model, train.seq_len)
    assert needed is not None
    # That counts the pairs that causality leaves out, which are about half of them; here they are just half.
    left_out = 6 * model.num_layers * train.seq_len * model.num_heads * model.key_dim
    assert counter.get_total_flops() == train.global_batch * train.seq_len * (needed - left_out)


def test_who_cannot_take_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path)
    of_kind = {side.kind: side for side in bench.sides()}
    quickstart = config_of("quickstart", tmp_path, 1)
    reason = bench.why_not(of_kind["transformers"], quickstart)
    assert reason is not None
    assert "PR-MoE" in reason
    assert bench.why_not(of_kind["deepspeed"], quickstart) is None
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.why_not(of_kind["deepspeed"], quickstart) == "deepspeed is not installed"


def test_the_table_has_ratios_to_the_best_peer_and_to_the_floor() -> None:
    rows = {
        name: {"layout": "1 × 2", "step_s": s, "memory": 2e6} for name, s in (("ours", 0.5), ("x", 1.0), ("y", 2.0))
    }
    result = {
        "tokens": 100,
        "sides": rows,
        "floor_s": {"1 × 2": 0.4},
        "phases": {"ours": {"forward": 1.0, "other": 3.0}},
    }
    table = bench.as_markdown({**result, "skipped": {"z": "z is not installed"}})
    assert "| ours | 1 × 2 | 0.500 | 200 | 2.00 | 0.80 | 2 |" in table
    assert "| y | 1 × 2 | 2.000 | 50 | 0.50 | 0.20 | 2 |" in table
    assert "ours: forward 25%, other 75%" in table
    assert "skipped: z: z is not installed" in table
