"""One seed and one global batch mean one training, however it is spread over processes and dispatched."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import ENGINES, write_corpus
from twohop.comm import CostModel
from twohop.comm.cost import LevelCost
from twohop.trainer.errors import UserError

Result = tuple[runs.Curve, dict[str, torch.Tensor]]


def curves(directory: Path, nproc: int, *overrides: str) -> list[Result]:
    return run_distributed(runs.curve, nproc, directory, overrides, init=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("invariants")
    write_corpus(directory)
    return directory


@pytest.fixture(scope="module")
def reference_run(directory: Path) -> Result:
    """Four micro-batches a step, accumulated; all experts here."""
    (result,) = run_distributed(runs.whole_curve, 1, directory, (), init=False, timeout=180)
    return result


@pytest.fixture(scope="module")
def one_process(reference_run: Result) -> runs.Curve:
    reference, _ = reference_run
    assert len(reference) == 20
    losses = [loss for loss, _ in reference]
    assert losses[-1] < losses[0] - 0.5  # it learns: agreement below is not agreement on noise
    assert all(norm > 0.5 for _, norm in reference[:5])  # and clipping (0.5) is at work
    return reference


@pytest.mark.parametrize(
    ("nproc", "ep_size", "engine"),
    [
        (2, "1", "ddp"),
        (2, "2", "ddp"),
        (4, "1", "ddp"),  # data parallel 4
        (4, "2", "ddp"),
        (4, "4", "ddp"),
        (4, "[2,4]", "ddp"),  # every layer with its own groups, as in a PR-MoE pyramid
        (1, "1", "fsdp"),
        (2, "1", "fsdp"),
        (4, "[2,4]", "fsdp"),
        (2, "2", "zero-1"),
        (1, "1", "zero-2"),
        (4, "[2,4]", "zero-2"),
    ],
)
def test_loss_gradient_norm_and_weights_do_not_depend_on_the_world(
    directory: Path, reference_run: Result, one_process: runs.Curve, nproc: int, ep_size: str, engine: str
) -> None:
    overrides = (f"comm.ep_size={ep_size}", *ENGINES[engine])
    found = run_distributed(runs.whole_curve, nproc, directory, overrides, init=False, timeout=180)
    for curve, _ in found:
        assert curve == found[0][0]  # all ranks report the same bits
    for step, (ours, theirs) in enumerate(zip(found[0][0], one_process, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"
    for name, weights in reference_run[1].items():
        off = torch.linalg.vector_norm(found[0][1][name] - weights)
        assert off <= 1e-5 * torch.linalg.vector_norm(weights), name


def test_dispatchers_agree_to_the_bit(directory: Path) -> None:
    layout = ("comm.ranks_per_node=2", "comm.ep_size=[2,4]", "train.steps=8")
    flat, hierarchical, dedup = (
        curves(directory, 4, f"comm.dispatcher={name}", *layout) for name in ("flat", "hierarchical", "dedup")
    )
    for rank in range(4):
        for other in (hierarchical, dedup):
            assert other[rank][0] == flat[rank][0]
            for name, weights in flat[rank][1].items():
                assert torch.equal(other[rank][1][name], weights), name


def test_replicas_stay_equal_to_the_bit(directory: Path) -> None:
    """Dense parameters on all ranks, and the experts of an EDP group, would drift apart if a reduction were wrong."""
    found = [weights for _, weights in curves(directory, 4, "comm.ep_size=2", "train.steps=5")]
    for name, weights in found[0].items():
        is_expert = ".experts." in name
        assert torch.equal(found[2][name], weights), name  # ranks 0 and 2 hold the same experts
        assert torch.equal(found[1][name], weights) != is_expert, name


def test_eight_processes_mean_the_same(directory: Path) -> None:
    """2 nodes x 4 ranks, layers of 4 and 8 experts over EP 4 and 8."""
    larger = ("train.global_batch=16", "train.steps=6")
    reference, _ = curves(directory, 1, *larger)[0]
    found = curves(directory, 8, *larger, "comm.ranks_per_node=4", "comm.ep_size=[4,8]")
    for step, (ours, theirs) in enumerate(zip(found[0][0], reference, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("how", ["comm.chunks=3", "comm.dispatcher=auto"])
def test_overlap_and_choice_change_no_result(directory: Path, one_process: runs.Curve, how: str) -> None:
    found = curves(directory, 4, how, "comm.ranks_per_node=2", "comm.ep_size=4")
    for step, (ours, theirs) in enumerate(zip(found[0][0], one_process, strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"
    assert (directory / "run" / "cost.json").exists() == (how == "comm.dispatcher=auto")


def test_a_kept_cost_model_is_used_instead_of_a_probe(directory: Path) -> None:
    base = {"flat": 1e-4, "hierarchical": 1e-4, "dedup": 1e-4}
    model = CostModel({"node": LevelCost(1e-5, 1e-7), "local": LevelCost(1e-6, 1e-9)}, 1e-10, 1e-5, base)
    model.save(directory / "kept.json")
    (directory / "run" / "cost.json").unlink(missing_ok=True)
    kept = ("comm.dispatcher=auto", f"comm.cost_file={directory / 'kept.json'}", "comm.auto_wires=[bf16]")
    curves(directory, 2, *kept, "comm.ranks_per_node=1", "train.steps=1")
    assert not (directory / "run" / "cost.json").exists()


def test_a_narrow_wire_trains_almost_the_same(directory: Path, one_process: runs.Curve) -> None:
    wires = [f"comm.wire.{direction}.between=bf16" for direction in
             ("dispatch", "combine", "dispatch_backward", "combine_backward")]  # fmt: skip
    curve, _ = curves(directory, 2, *wires, "comm.ranks_per_node=1", "comm.ep_size=2")[0]
    assert curve != one_process
    for (loss, _), (reference, _) in zip(curve, one_process, strict=True):
        # Each row is off by at most 2**-8 of itself, and MoE layers are a part of the loss's way only.
        assert loss == pytest.approx(reference, rel=2**-8)


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_that_diverges_says_what_to_lower(directory: Path, nproc: int) -> None:
    """One process sees it in the loss; with experts elsewhere, dispatch refuses the rows before they spread."""
    with pytest.raises(UserError, match=r"step \d+: .*lower optim\.lr=1e\+30"):
        curves(directory, nproc, "optim.lr=1e30", "train.steps=5", "schedule.warmup_steps=0")
