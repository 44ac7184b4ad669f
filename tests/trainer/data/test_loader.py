"""Batches made ahead: the same ones, with the same errors, and nothing is left behind."""

import threading
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end.runs import records
from tests.tiny import tiny_config, write_corpus
from twohop.trainer.config import Config
from twohop.trainer.data import Data, Loader, build_data
from twohop.trainer.data.loader import Step
from twohop.trainer.errors import DataError

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, "data.document_mask=true", "train.steps=6")


@pytest.fixture
def data(config: Config) -> Data:
    return build_data(config.data, config.train.seq_len, len)


def contents(step: Step) -> list:
    """Everything of a step, as plain numbers."""
    loaded = [(micro.number, micro.targets, micro.load()) for micro in step.micro_batches]
    return [
        step.targets,
        *((n, t, {k: x.tolist() for k, x in b.inputs.items()}, b.targets.tolist()) for n, t, b in loaded),
    ]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("twohop-data")]


@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_any_prefetch_gives_the_same_batches_in_any_order_of_steps(config: Config, data: Data, ahead: int) -> None:
    def taken(prefetch: int | None) -> list:
        config.data.prefetch = prefetch
        loaders = [Loader(config, data, CPU, rank, 2) for rank in range(2)]
        found = [contents(loader.step(step)) for step in (0, 1, 2, 4, 5, 3, 7) for loader in loaders]
        for loader in loaders:
            loader.close()
        return found

    expected = taken(0)
    assert taken(ahead) == expected
    numbers = [micro[0] for step in expected[:2] for micro in step[1:]]
    assert numbers == [0, 2, 1, 3]  # dealt out in turn
    assert not threads()


def test_the_cpu_has_no_thread_by_default(config: Config, data: Data) -> None:
    with_default = Loader(config, data, CPU, 0, 1)
    with_default.step(0)
    assert not threads()


def test_steps_are_made_ahead_and_no_further(config: Config, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    config.data.prefetch = 2
    loader, read = Loader(config, data, CPU, 0, 1), data.train.batch
    made, third = [], threading.Event()

    def count(numbers: list[int]) -> object:
        made.append(len(numbers))
        if len(made) == 3 * 4:
            third.set()
        return read(numbers)

    monkeypatch.setattr(data.train, "batch", count)
    loader.step(0)
    assert third.wait(60)  # step 0 and two more, of 4 micro-batches each
    for step in range(1, 6):
        loader.step(step)
    loader.close()
    assert len(made) == 6 * 4  # none past the last step


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_is_raised_by_its_own_step(
    config: Config, data: Data, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.data.prefetch = ahead
    loader, read = Loader(config, data, CPU, 0, 1), data.train.batch
    bad = [int(n) for n in contents(loader.step(1))[1][2]["sample_B"]]
    loader.close()

    def fail(numbers: list[int]) -> object:
        if list(numbers) == bad:
            raise DataError("the disk is gone; bring it back")
        return read(numbers)

    monkeypatch.setattr(data.train, "batch", fail)
    contents(loader.step(0))
    with pytest.raises(DataError, match="the disk is gone"):
        contents(loader.step(1))
    contents(loader.step(2))
    loader.close()
    assert not threads()


def test_training_is_the_same_and_leaves_no_thread(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    without, ahead = (
        run_distributed(records, 1, tmp_path, ["train.steps=3", f"data.prefetch={n}"], init=False)[0] for n in (0, 2)
    )
    for one, two in zip(without, ahead, strict=True):
        assert [one[key] for key in ("loss", "grad_norm")] == [two[key] for key in ("loss", "grad_norm")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_batches_for_a_gpu_are_pinned(config: Config, data: Data) -> None:
    loader = Loader(config, data, torch.device("cuda"), 0, 1)
    (micro, *_) = loader.step(0).micro_batches
    assert micro.load().targets.is_pinned()
    assert not micro.load().inputs["sample_B"].is_pinned()
    assert torch.equal(micro.load().to(torch.device("cuda")).targets.cpu(), micro.load().targets)
    loader.close()
