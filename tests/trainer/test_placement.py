"""Experts that move: nothing changes but where rows travel."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.tiny import ENGINES, tiny_config, write_corpus
from twohop.models import build_model
from twohop.models.moe import MoELayer
from twohop.trainer.config import PlacementConfig
from twohop.trainer.engines import build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.initial import start_weights
from twohop.trainer.loop import train_step
from twohop.trainer.placement import Placement, _in_words, _node
from twohop.trainer.setup import set_up
from twohop.trainer.validate.groups import validate

LOOKS = ("placement.every=2", "placement.sample=100")


def few_steps(directory: Path, top_k: int, *overrides: str) -> dict[str, Any]:
    """5 steps, with a look at the load after each second one; what they measured, and what a checkpoint would hold."""
    config = tiny_config(directory, "comm.ranks_per_node=2", f"model.moe.router.top_k={top_k}", *overrides)
    run = set_up(config, directory, torch.device("cpu"))
    start_weights(run)
    steps, norms, moves = [], [], []
    for step in range(5):
        record = train_step(run, step)
        steps.append((record["loss"], record["moe"]))
        norms.append(record["grad_norm"])
        if (moved := run.placement.after_step(step + 1)) is not None:
            moves.append((step + 1, moved["layers"]))
    state = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in run.state().items()}
    layers = [layer for _, layer in run.model.moe_layers()]
    return {
        "steps": steps,
        "norms": norms,
        "moves": moves,
        "state": {name: tensor.clone() for name, tensor in state.items()},
        "shadowed": [_experts_with_shadows(layer) for layer in layers],
        "slots": [None if layer.slots_E is None else layer.slots_E.tolist() for layer in layers],
    }


def _experts_with_shadows(layer: MoELayer) -> list[int]:
    slots = range(layer.dispatcher.num_experts) if layer.slots_E is None else layer.slots_E.tolist()
    shadows = layer.shadows.slots if layer.shadows else ()
    return [expert for expert, slot in enumerate(slots) if slot in shadows]


def still_and_moving(directory: Path, placement: str, top_k: int, *settings: str) -> tuple[list, list]:
    """What all ranks say of a run whose experts stay, and of one whose experts move; what moves must hold."""
    write_corpus(directory)
    still, moving = (
        run_distributed(few_steps, 4, directory, top_k, *settings, *overrides, timeout=180)
        for overrides in ((), (f"placement.name={placement}", *LOOKS))
    )
    assert (still[0]["slots"], still[0]["moves"]) == ([None, None], [])
    assert [step for step, _ in moving[0]["moves"]] == [2, 4]
    assert all(result["slots"] == moving[0]["slots"] and result["moves"] == moving[0]["moves"] for result in moving)
    assert any(slots is not None and slots != sorted(slots) for slots in moving[0]["slots"])
    key = "rank_load" if placement == "balanced" else "rows_between_nodes"
    for _, layers in moving[0]["moves"]:
        for entry in layers.values():
            better = entry["after"][key] < entry["before"][key]
            assert better if entry["moved"] else entry["before"] == entry["after"]
    return still, moving


@pytest.mark.parametrize(
    ("placement", "top_k", "settings"),
    [
        ("balanced", 1, ["engine.precision=bf16_params"]),
        ("affinity", 2, []),
        ("balanced", 2, [*ENGINES["fsdp"], "comm.ep_size=2"]),
        ("balanced", 2, [*ENGINES["zero-2"], "comm.ep_size=2"]),
        ("balanced", 3, ["comm.sums_at_home=true"]),
    ],
    ids=["bf16_params", "ddp", "fsdp", "zero-2", "sums at home"],
)
def test_moves_change_no_bit_of_training_and_checkpoints_know_nothing_of_them(
    tmp_path: Path, placement: str, top_k: int, settings: list[str]
) -> None:
    """A sum of two rounded products is the same whoever adds it up, one of three is if it is formed at home."""
    for a, b in zip(*still_and_moving(tmp_path, placement, top_k, *settings), strict=True):
        assert a["steps"] == b["steps"]
        # The norm adds the squares of a rank's experts in fp64, so that its last bits know where experts are.
        assert b["norms"] == pytest.approx(a["norms"], rel=1e-13)
        assert a["state"].keys() == b["state"].keys()
        for name in a["state"]:
            assert torch.equal(a["state"][name], b["state"][name]), name


def test_moves_of_three_friends_change_rounding_alone(tmp_path: Path) -> None:
    """Partial sums are formed where experts live, so the order of three depends on who lives together."""
    for a, b in zip(*still_and_moving(tmp_path, "affinity", top_k=3), strict=True):
        for (loss, _), (other, _) in zip(a["steps"], b["steps"], strict=True):
            assert other == pytest.approx(loss, rel=1e-4)
        for name in a["state"]:  # experts in the order of numbers: others differ by their whole initial values
            assert a["state"][name].shape == b["state"][name].shape
            if name.startswith("model."):
                torch.testing.assert_close(a["state"][name], b["state"][name], rtol=0, atol=0.02)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_shadows_of_the_hottest_experts_change_rounding_alone(tmp_path: Path, engine: str) -> None:
    """They are computed at home, so that their part of a token's sum is added last."""
    write_corpus(tmp_path)
    shadows = ["placement.shadows=1", *LOOKS]
    if engine == "ddp":
        shadows += ["placement.name=balanced", "train.recompute=full"]
    without, shadowed = (
        run_distributed(few_steps, 4, tmp_path, 2, "comm.chunks=2", *ENGINES[engine], *overrides, timeout=180)
        for overrides in ((), shadows)
    )
    assert any(shadowed[0]["shadowed"])
    (_, first), (_, second) = shadowed[0]["moves"]
    assert [entry["shadowed"] for entry in second.values()] == shadowed[0]["shadowed"]
    for entry in first.values():
        better = entry["after"]["rank_load"] < entry["before"]["rank_load"]
        assert better if entry["shadowed"] else entry["before"] == entry["after"]
        assert len(entry["shadowed"]) <= 1
    for a, b in zip(without, shadowed, strict=True):
        assert a["steps"][:2] == b["steps"][:2]  # there are none yet
        for (loss, _), (other, _) in zip(a["steps"], b["steps"], strict=True):
            assert other == pytest.approx(loss, rel=1e-4)
        assert [*a["state"]] == [*b["state"]]


def test_the_newest_tokens_are_looked_at_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twohop.trainer.placement.world_size", lambda: 2)
    settings = ["model.vocab_size=32", "placement.name=balanced", "placement.every=2", "placement.sample=7"]
    config = tiny_config(tmp_path, *settings, "comm.wire.dispatch.between=bf16")
    model = build_model(config.model)
    placement = Placement(build_engine(model, config), config)
    (name, layer), *_ = model.moe_layers()
    ids_NK = torch.arange(3 * 2).view(3, 2) % 4
    for later in (0, 1):
        assert layer.observe is not None
        layer.observe((ids_NK + later) % 4)
    assert torch.equal(placement._seen[name], torch.cat([(ids_NK + 1) % 4, ids_NK[:1]]))  # half of seven, rounded up
    record = placement.after_step(2)
    assert record is not None
    assert list(record["layers"]) == [name]
    assert placement._seen == {}
    assert placement.row_bytes == (4 + 4 + 4 + 2) * config.model.dim


def test_what_has_shadows_counts_nothing_for_where_the_others_go(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "placement.name=balanced", "placement.shadows=1")
    placement = Placement(build_engine(build_model(config.model), config), config)
    dispatcher = SimpleNamespace(num_experts=4, topology=SimpleNamespace(block=(1, 2)))
    layer: Any = SimpleNamespace(dispatcher=dispatcher, slots_E=None, shadows=None)
    ids_TK = np.repeat([0, 1, 2, 3], [10, 4, 3, 3])[:, None]
    slots_E, shadowed, before, after = placement._decide(layer, [(0, ids_TK)])
    assert (slots_E.tolist(), shadowed) == ([0, 1, 2, 3], [0])
    assert before.rank_load == 14 / 10
    assert after.rank_load == (10 / 2 + 6) / 10  # by the load of expert 0 as well, 3 would go to it, and the rest be 7


@pytest.mark.parametrize(("dispatcher", "rows"), [("dedup", 1.0), ("flat", 2.0)])
def test_nor_for_who_are_friends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dispatcher: str, rows: float) -> None:
    settings = [
        "model.vocab_size=32",
        "placement.name=affinity",
        "placement.shadows=1",
        f"comm.dispatcher={dispatcher}",
    ]
    config = tiny_config(tmp_path, *settings)
    placement = Placement(build_engine(build_model(config.model), config), config)
    dispatcher_of: Any = SimpleNamespace(num_experts=4, topology=SimpleNamespace(block=(2, 2)))
    layer: Any = SimpleNamespace(dispatcher=dispatcher_of, slots_E=None, shadows=None)
    given: list[Any] = []
    monkeypatch.setattr("twohop.trainer.placement.place", lambda *args: given.append(args) or np.arange(4))
    *_, before, _ = placement._decide(layer, [(0, np.array([[2, 3]] * 6))])
    assert before.crossing_rows == rows  # both experts are on the other node: one row to it, or one to each rank
    placement._decide(layer, [(0, np.repeat([[0, 1], [1, 2], [0, 3]], [10, 3, 5], axis=0))])
    kind, load_E, together_EE, block = given[-1]
    assert (kind, load_E.tolist(), block) == ("affinity", [0, 13, 3, 5], (2, 2))
    assert together_EE.tolist() == [[0, 0, 0, 0], [0, 0, 3, 0], [0, 3, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [(["comm.dispatcher=dedup"], 1), (["comm.dispatcher=flat"], 2), (["comm.sums_at_home=true"], 3)],
)
def test_rows_between_nodes_are_those_that_are_sent(tmp_path: Path, settings: list[str], rows: int) -> None:
    """To three experts on the two ranks of the other node."""
    config = tiny_config(tmp_path, "model.vocab_size=32", "placement.name=balanced", *settings)
    placement = Placement(build_engine(build_model(config.model), config), config)
    dispatcher = SimpleNamespace(num_experts=8, topology=SimpleNamespace(block=(2, 2)))
    layer: Any = SimpleNamespace(dispatcher=dispatcher, slots_E=None, shadows=None)
    _, _, before, _ = placement._decide(layer, [(0, np.array([[4, 5, 6]] * 3))])
    assert before.crossing_rows == rows


def test_what_is_not_better_stays_with_its_shadows(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "placement.name=balanced", "placement.shadows=1")
    placement = Placement(build_engine(build_model(config.model), config), config)
    dispatcher = SimpleNamespace(num_experts=4, topology=SimpleNamespace(block=(1, 2)))
    layer: Any = SimpleNamespace(
        dispatcher=dispatcher, slots_E=torch.tensor([2, 3, 0, 1]), shadows=SimpleNamespace(slots=(1,))
    )
    slots_E, shadowed, before, after = placement._decide(layer, [(0, np.arange(8)[:, None] % 4)])
    assert (slots_E.tolist(), shadowed) == ([2, 3, 0, 1], [3])
    assert before == after


def test_a_rank_knows_its_node() -> None:
    layers: Any = [
        SimpleNamespace(dispatcher=SimpleNamespace(topology=SimpleNamespace(ep_rank=rank, block=(2, 2))))
        for rank in range(4)
    ]
    assert [_node(layer) for layer in layers] == [0, 0, 1, 1]


def test_shadows_follow_experts_that_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path, "model.vocab_size=32", "placement.name=balanced", "placement.every=1")
    model = build_model(config.model)
    placement = Placement(build_engine(model, config), config)
    (_, layer), *_ = model.moe_layers()
    told: list[Any] = []
    monkeypatch.setattr("twohop.trainer.placement.gather_objects", lambda own: told.append(own) or [own])
    monkeypatch.setattr("twohop.trainer.placement._node", lambda layer: 5)
    monkeypatch.setattr("twohop.trainer.placement.Shadows", lambda slots, *_: SimpleNamespace(slots=tuple(slots)))
    nothing = SimpleNamespace(crossing_rows=0.0, rank_load=1.0)
    for number, slots in enumerate(([0, 1, 2, 3], [3, 2, 1, 0])):
        decided = np.array(slots), [0], nothing, nothing
        monkeypatch.setattr(placement, "_decide", lambda *_, decided=decided: decided)
        assert layer.observe is not None
        layer.observe(torch.tensor([[0, 1]]))
        placement.after_step(number + 1)
        assert layer.shadows is not None
        assert layer.shadows.slots == (slots[0],)
        ((node, ids_TK),) = told[-2]
        assert (node, ids_TK.tolist()) == (5, [[0, 1]])  # what a rank tells the others


def test_a_look_in_words_has_means_over_layers_and_of_nodes_only_where_there_are_some() -> None:
    def entry(rows: float, load: float) -> dict[str, float]:
        return {"rows_between_nodes": rows, "rank_load": load}

    record = {
        "0": {"moved": 3, "shadowed": [2], "before": entry(1.5, 2.0), "after": entry(0.5, 1.25)},
        "1": {"moved": 0, "shadowed": [], "before": entry(1.0, 1.0), "after": entry(1.0, 1.0)},
    }
    assert _in_words(record) == (
        "3 experts moved, 1 shadowed; a token sends 1.25 → 0.75 rows between nodes, "
        "the fullest rank has 1.50 → 1.12 of the mean load"
    )
    record = {"0": {"moved": 4, "shadowed": [], "before": entry(0.0, 3.0), "after": entry(0.0, 1.5)}}
    assert _in_words(record) == "4 experts moved; the fullest rank has 3.00 → 1.50 of the mean load"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["placement.shadows=4"], r"placement\.shadows=4 does not go with model\.moe\.experts=.*: a layer has 4"),
        (["placement.shadows=1", "model.moe.cache.enabled=true", "data.order=batches"], r"placement\.shadows=1 does"),
        (["placement.name=best"], r"placement=best: unknown"),
        (["placement.name=affinity", "model.moe.router.top_k=1"], r"top_k=1: tokens have one expert"),
        (["placement.name=affinity", "comm.sums_at_home=true"], r"sums_at_home=true: rows to friends on one node are"),
        (["placement.shadows=1", "comm.sums_at_home=true"], r"sums_at_home=true: what shadows compute is added last"),
        (["placement.name=balanced", "model.moe.cache.enabled=true", "data.order=batches"], r"moe\.cache\.enabled"),
        (
            ["placement.name=affinity", "model.moe.router.name=sigmoid", "model.moe.router.groups=2",
             "model.moe.router.top_groups=1", "model.moe.router.jitter=0"],
            r"model\.moe\.router\.groups=2: groups are experts of one node",
        ),
    ],
)  # fmt: skip
def test_what_cannot_move_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(tmp_path, *overrides), 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"every": 5}, r"placement\.every=5 has no use with placement=contiguous"),
        ({"sample": 0}, r"placement\.sample=0"),
        ({"shadows": -1}, r"placement\.shadows=-1"),
    ],
)
def test_impossible_values_are_refused(keys: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlacementConfig(**keys)
