"""Checkpoints: every layout reads every other, and damage, foreign content and a full disk are met with one error."""

import hashlib
import json
import os
import pickle
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.end_to_end.runs import start
from tests.tiny import ENGINES, write_corpus
from twohop.trainer.checkpoints.checkpoint import CheckpointStore, load_tensors
from twohop.trainer.errors import CheckpointError
from twohop.trainer.loop import train_step
from twohop.trainer.setup import Run
from twohop.trainer.world import gather_objects


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of all tensors, those of experts gathered over the world."""
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


def save_after_two_steps(directory: Path, overrides: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Save; return what was saved, and the record of the step that comes next."""
    run = start(directory, *overrides)
    for step in range(2):
        train_step(run, step)
    run.checkpoints.save(2, run.state(), run.identity(), "tracker-7")
    saved = whole(run.state())
    return saved, train_step(run, 2)


def load_and_step(directory: Path, overrides: Sequence[str]) -> tuple[int, str, dict[str, Tensor], dict[str, Any]]:
    run = start(directory, *overrides)
    for tensor in run.engine.model_state().values():  # so that one which is not loaded shows
        tensor.zero_()
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    state = run.state()
    load_tensors(checkpoint, state, run.identity())
    run.engine.restored(state)
    loaded = whole(run.state())
    return checkpoint.step, checkpoint.tracker_id, loaded, train_step(run, 2)


# Every engine saves and loads, every number of ranks and EP size too; all pairs: scripts/elastic_pairs.py.
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [
        ((2, "2", "ddp"), (1, "1", "fsdp")),
        ((2, "1", "fsdp"), (4, "[4,1]", "zero-1")),
        ((1, "1", "zero-2"), (2, "2", "ddp")),
        ((4, "[2,4]", "zero-1"), (4, "[4,1]", "ddp")),
        ((4, "4", "fsdp"), (2, "2", "zero-2")),
    ],
)
def test_every_layout_reads_every_other(
    tmp_path: Path, saved_by: tuple[int, str, str], loaded_by: tuple[int, str, str]
) -> None:
    write_corpus(tmp_path)
    (saving, saving_ep, saving_engine), (loading, loading_ep, loading_engine) = saved_by, loaded_by
    overrides = [f"comm.ep_size={saving_ep}", *ENGINES[saving_engine]]
    saved, expected = run_distributed(save_after_two_steps, saving, tmp_path, overrides, init=False, timeout=180)[0]
    assert any("experts" in name and name.startswith("optim.") and t.dim() == 3 for name, t in saved.items())
    overrides = [f"comm.ep_size={loading_ep}", *ENGINES[loading_engine]]
    found = run_distributed(load_and_step, loading, tmp_path, overrides, init=False, timeout=180)
    for step, tracker_id, loaded, record in found:
        assert (step, tracker_id) == (2, "tracker-7")
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(loaded[name], tensor), name
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


# In one process from here on: what is tested does not depend on the number of ranks.


def tiny_state(value: float) -> dict[str, Tensor]:
    return {"model.a": torch.full((64, 64), value), "model.b": torch.arange(5.0) * value}


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, messages: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, log=messages.append)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_the_newest_are_kept(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        store.save(step, tiny_state(step), {}, "id")
    assert names(store) == ["step-00000002", "step-00000003"]
    newest = store.latest()
    assert newest is not None
    assert newest.step == 3
    state = tiny_state(0)
    load_tensors(newest, state, {})
    assert torch.equal(state["model.b"], torch.arange(5.0) * 3)


def test_milestones_are_never_deleted(store: CheckpointStore) -> None:
    store.keep_every = 4
    for step in range(1, 8):
        store.save(step, tiny_state(step), {}, "id")
    assert names(store) == [f"step-0000000{step}" for step in (4, 6, 7)]
    store.save(12, tiny_state(1), {}, "id")
    store.save(13, tiny_state(1), {}, "id")
    assert names(store) == [f"step-000000{step}" for step in ("04", "12", "13")]


def test_without_checkpoints_there_is_nothing_to_load(store: CheckpointStore) -> None:
    assert store.latest() is None


def test_an_unfinished_checkpoint_is_ignored_and_replaced(store: CheckpointStore) -> None:
    unfinished = store.directory / ".unfinished-step-00000001"
    unfinished.mkdir(parents=True)
    (unfinished / "__0_0.distcp").write_text("half of it")
    assert store.latest() is None
    store.save(1, tiny_state(1), {}, "id")
    assert names(store) == ["step-00000001"]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: flip_a_byte(path / "__0_0.distcp"), "__0_0.distcp is not what was written"),
        (lambda path: os.truncate(path / "__0_0.distcp", 100), "__0_0.distcp is not what was written"),
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: flip_a_byte(path / ".metadata"), ".metadata is not what was written"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"step": 2}'), "manifest.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    store: CheckpointStore, messages: list[str], damage: Callable[[Path], Any], named: str
) -> None:
    store.save(1, tiny_state(1), {}, "id")
    newest = store.save(2, tiny_state(2), {}, "id")
    damage(newest.path)
    found = store.latest()
    assert found is not None
    assert found.step == 1
    assert len(messages) == 1
    assert str(newest.path) in messages[0]
    assert named in messages[0]
    # Steps taken again replace it, and it does not push out the good one meanwhile.
    assert store.keep == 2
    store.save(2, tiny_state(5), {}, "id")
    replaced = store.latest()
    assert replaced is not None
    assert replaced.step == 2
    assert len(messages) == 1


def test_a_damaged_newest_does_not_push_out_good_ones(store: CheckpointStore) -> None:
    store.keep = 1
    damaged = store.save(30, tiny_state(1), {}, "id")
    flip_a_byte(damaged.path / "__0_0.distcp")
    store.save(20, tiny_state(1), {}, "id")
    assert names(store) == ["step-00000020"]


def test_if_all_are_damaged_the_run_does_not_start_over_silently(store: CheckpointStore) -> None:
    flip_a_byte(store.save(1, tiny_state(1), {}, "id").path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        store.latest()


def test_a_checkpoint_of_another_model_names_the_key(store: CheckpointStore) -> None:
    checkpoint = store.save(1, tiny_state(1), {"model.dim": 16, "model.moe.experts": [4, 8]}, "id")
    load_tensors(checkpoint, tiny_state(0), {"model.moe.experts": [4, 8]})
    with pytest.raises(CheckpointError, match=r"was made with model\.moe\.experts=\[4, 8\], but this run has .*=\[4\]"):
        load_tensors(checkpoint, tiny_state(0), {"model.dim": 16, "model.moe.experts": [4]})


def test_a_key_that_is_newer_than_the_checkpoint_counts_as_its_default(store: CheckpointStore) -> None:
    known = {"model.dim": 16, "model.encoder": None, "data.fingerprint": "a"}
    checkpoint = store.save(1, tiny_state(1), known, "id")
    defaults = {"model.moe.every": 2, "model.moe.residual": "none", "model.num_kv_heads": None, "model.ffn_dims": []}
    load_tensors(checkpoint, tiny_state(0), known | defaults)
    for key, value, default in (
        ("model.moe.every", 3, 2),
        ("model.moe.residual", "learned", "none"),
        ("model.encoder.moe.every", 2, None),  # no default: it is known that there was no encoder
        ("train.no_such_key", 1, None),
    ):
        with pytest.raises(CheckpointError, match=rf"{key}={default}, but this run has {key}={value}"):
            load_tensors(checkpoint, tiny_state(0), known | {key: value})


def test_a_tensor_that_is_not_there_is_an_error(store: CheckpointStore) -> None:
    checkpoint = store.save(1, tiny_state(1), {}, "id")
    with pytest.raises(CheckpointError, match=r"model\.new"):
        load_tensors(checkpoint, tiny_state(0) | {"model.new": torch.zeros(3)}, {})


class Payload:
    """Unpickles into a call, as an attack would."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("/tmp/twohop-unpickled",)


def test_metadata_that_would_run_code_is_refused(store: CheckpointStore, messages: list[str]) -> None:
    path = store.save(1, tiny_state(1), {}, "id").path
    content = pickle.dumps(Payload())
    (path / ".metadata").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][".metadata"] = [len(content), hashlib.sha256(content).hexdigest()]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        store.latest()
    assert "mkdir" in messages[0]
    assert not Path("/tmp/twohop-unpickled").exists()


def fill_the_disk(directory: Path) -> tuple[str, list[str], int]:
    """Save with no room for more than some kilobytes in a file; then say what is left."""
    run: Run = start(directory)
    run.checkpoints.save(1, run.state(), run.identity(), "id")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        run.checkpoints.save(2, run.state(), run.identity(), "id")
        problem = "none"
    except CheckpointError as error:
        problem = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = sorted(path.name for path in run.checkpoints.directory.iterdir())
    gather_objects(None)
    latest = run.checkpoints.latest()
    return problem, left, latest.step if latest else -1


@pytest.mark.parametrize("nproc", [1, 2])
def test_no_room_on_the_disk(tmp_path: Path, nproc: int) -> None:
    write_corpus(tmp_path)
    for problem, left, step in run_distributed(fill_the_disk, nproc, tmp_path, init=False):
        assert "step-00000002: rank 0: File too large; free some space" in problem
        assert "step-00000001 is whole" in problem
        assert left == ["step-00000001"]
        assert step == 1


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no /dev/full on this system")
def test_a_full_device_is_named(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write with the error of a full disk."""
    store.save(1, tiny_state(1), {}, "id")
    opened = Path.open

    def open_full(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return opened(Path("/dev/full") if path.suffix == ".distcp" and "w" in mode else path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.save(2, tiny_state(2), {}, "id")
    assert names(store) == ["step-00000001"]
