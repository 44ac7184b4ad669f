"""Memory of real runs against `twohop plan`: with two ranks within 5 %, in one process within 1 %."""

import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed import run_distributed
from twohop.models.routers.base import Routing, TokenInfo
from twohop.models.routers.softmax_topk import SoftmaxTopKRouter
from twohop.trainer.config import Recompute

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

import run_memory as bench

MODEL = bench.MODEL | {"num_layers": 4, "moe": bench.MODEL["moe"] | {"experts": [4, 8]}}
IMAGES = {
    "kind": "vit", "vocab_size": 10, "dim": 256, "num_layers": 4, "num_heads": 8, "ffn_dim": 1024,
    "moe": {"experts": [4, 8], "every": 2, "router": {"name": "noisy", "top_k": 2}},
}  # fmt: skip
PAIRS = MODEL | {
    "kind": "encoder_decoder", "num_layers": 2, "num_tasks": 1,
    "moe": {"experts": [8], "every": 2, "router": {"name": "task", "top_k": 2}},
    "encoder": {"num_layers": 2, "moe": {"experts": [4], "every": 2, "router": {"top_k": 1}}},
}  # fmt: skip


def of_ranks(cases: list[bench.Case], folder: Path, model: dict[str, Any] = MODEL) -> list[dict[str, Any]]:
    """Each case on this world."""
    data = {"vit": of_digits, "encoder_decoder": of_pairs}.get(model.get("kind", ""), bench.data_of)
    with patch.object(bench, "MODEL", model), patch.object(bench, "data_of", data):
        return [bench.compared(case, folder) for case in cases]


def of_digits(folder: Path) -> dict[str, Any]:
    return {"source": "digits", "valid_fraction": 0.2}


def of_pairs(folder: Path) -> dict[str, Any]:
    """Sources of 64 tokens and targets of 56: eight words of seven letters, of which one is a vowel that goes."""
    draw = random.Random(0)

    def word() -> str:
        return "".join(draw.sample([*draw.choices("bcdfgh", k=6), "a"], 7))

    (folder / "pairs.txt").write_text("\n".join(" ".join(word() for _ in range(8)) for _ in range(2000)))
    tasks = {"tasks": ["no_vowels"]}
    return {"source": "multitask", "files": [str(folder / "pairs.txt")], "multitask": tasks, "valid_fraction": 0.1}


def test_memory_of_runs_is_as_planned(tmp_path: Path) -> None:
    """Of ddp, what it holds twice is its bucket; of the others, what they gather and send."""
    cases = [
        bench.Case("ddp", "fp32", (1, 2), 1, 1, 64),
        bench.Case("fsdp", "fp32", (1, 1), 2, 1, 64),
        bench.Case("zero1", "fp32", (1, 2), 1, 1, 64),
        bench.Case("zero2", "fp32", (1, 2), 2, 1, 64),
    ]
    for result in run_distributed(of_ranks, 2, cases, tmp_path, timeout=300)[0]:
        assert abs(result["error"]) < 0.05, bench.row(result)


def with_a_crowd(case: bench.Case, folder: Path) -> dict[str, Any]:
    """All tokens go to experts 0 and 1, and so to the first of two ranks."""

    def choose(self: SoftmaxTopKRouter, logits_NE: torch.Tensor, about: TokenInfo) -> Routing:
        first_E = torch.arange(self.num_experts) < 2
        return plainly(self, logits_NE.masked_fill(~first_E, -1e4), about)

    plainly = SoftmaxTopKRouter.choose
    with patch.object(SoftmaxTopKRouter, "choose", choose):
        return of_ranks([case], folder)[0]


def test_memory_of_the_busiest_and_of_the_idlest_rank_is_as_planned(tmp_path: Path) -> None:
    """Each with its own load, 2 and 0 times the mean; the result is the rank's whose plan is worse."""
    case = bench.Case("ddp", "bf16", (2, 2), 1, 4, 256, recompute="full")
    result = run_distributed(with_a_crowd, 2, case, tmp_path, timeout=300)[0]
    assert result["rows"] in ([4096, 4096], [0, 0])
    assert abs(result["error"]) < 0.02, bench.row(result)


def test_passes_are_those_of_a_real_run(tmp_path: Path) -> None:
    """In one process nothing is sent and no load is unequal, so what is left is rounding."""
    cases = [
        bench.Case("ddp", "bf16", (1, 1), 1, 2, 256, recompute=mode.value) for mode in (Recompute.none, Recompute.full)
    ]
    cases.append(bench.Case("ddp", "bf16_params", (1, 1), 1, 2, 256))
    for result in run_distributed(of_ranks, 1, cases, tmp_path, timeout=300)[0]:
        assert abs(result["error"]) < 0.01, bench.row(result)


def test_passes_of_images_and_of_pairs_are_those_of_a_real_run(tmp_path: Path) -> None:
    images = bench.Case("ddp", "fp32", (1, 1), 1, 16, 16)
    pairs = bench.Case("ddp", "bf16", (1, 1), 1, 8, 56, recompute="full", source_len=64)
    for model, case in ((IMAGES, images), (PAIRS, pairs)):
        (result,) = run_distributed(of_ranks, 1, [case], tmp_path, model, timeout=300)[0]
        assert abs(result["error"]) < 0.01, bench.row(result)


def test_memory_of_pairs_on_two_ranks_is_as_planned(tmp_path: Path) -> None:
    """Of both sides' blocks FSDP gathers those that come next."""
    case = bench.Case("fsdp", "fp32", (1, 2), 1, 8, 56, source_len=64)
    (result,) = run_distributed(of_ranks, 2, [case], tmp_path, PAIRS, timeout=300)[0]
    assert abs(result["error"]) < 0.05, bench.row(result)
