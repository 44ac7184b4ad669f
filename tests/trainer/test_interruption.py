"""Signals: the world stops after the same step with a checkpoint, from which it goes on to the bit."""

import ctypes
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import tiny_config, write_corpus
from twohop.trainer import interruption
from twohop.trainer.data import loader
from twohop.trainer.errors import Interrupted
from twohop.trainer.interruption import noting_stop_signals
from twohop.trainer.launching import workers
from twohop.trainer.monitoring.metrics import read_metrics
from twohop.trainer.world import rank

LENGTHS = ["train.steps=8", "eval.every=2", "checkpoint.every=3"]


def signal_amid(step: int, culprit: int, number: signal.Signals) -> None:
    """From now on, rank `culprit` gets the signal in the middle of `step`, counted from 0."""
    read = loader.step_numbers

    def read_and_signal(order: Any, seed: int, at: int, *sizes: int) -> list[int]:
        if (at, rank()) == (step, culprit):
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the thread that sees signals needs a moment
        return read(order, seed, at, *sizes)

    loader.step_numbers = read_and_signal


def stop(directory: Path, overrides: list[str]) -> str:
    """Train until a signal to rank 1 alone, amid step 4, ends it."""
    read, handler = loader.step_numbers, signal.getsignal(signal.SIGUSR1)
    signal_amid(3, 1, signal.SIGUSR1)
    try:
        workers.train(tiny_config(directory, *overrides), None)
        return "not stopped"
    except Interrupted as stopped:
        return str(stopped)
    finally:
        loader.step_numbers = read
        assert signal.getsignal(signal.SIGUSR1) is handler


def curve(directory: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of steps and evaluations, without what depends on the clock and on memory."""
    names = ("step", "kind", "loss", "grad_norm", "lr", "moe", "valid_loss", "valid_accuracy")
    return [{name: record.get(name) for name in names} for record in read_metrics(directory)]


def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_the_run_continues_to_the_bit(tmp_path: Path) -> None:
    """Checkpoints are written in the background; the last one is whole when the ranks end."""
    write_corpus(tmp_path)
    whole = run_distributed(
        runs.train_run, 2, tmp_path, [*LENGTHS, f"run.dir={tmp_path / 'whole'}"], init=False, timeout=180
    )[0]
    overrides = [*LENGTHS, "checkpoint.asynchronous=true"]
    message = "stopped by SIGUSR1 after step 4, which is saved; resume=auto goes on"
    assert run_distributed(stop, 2, tmp_path, overrides, init=False, timeout=180) == [message] * 2
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000003", "step-00000004"]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")[:6]  # four steps and two evaluations
    overrides += ["resume=auto"]
    summary = run_distributed(runs.train_run, 2, tmp_path, overrides, init=False, timeout=180)[0]
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert summary["valid_loss"] == whole["valid_loss"]


def test_without_a_signal_nothing_is_agreed_and_afterwards_all_is_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with noting_stop_signals() as stop:
        assert stop.agreed(torch.device("cpu")) is None
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def wait_in_a_library(same_s: float, pipe: Connection) -> None:
    """Note a signal, then hang where no Python code runs, as a rank does that waits for ranks which never answer."""
    interruption.SAME_S = same_s
    with noting_stop_signals() as stop:
        pipe.send("ready")
        while stop.number == 0:
            time.sleep(0.01)
        pipe.send(stop.number)
        for _ in range(600):  # not one sleep, which a signal cuts short
            ctypes.CDLL(None).usleep(100_000)


@pytest.mark.parametrize(("same_s", "code"), [(0.0, 128 + signal.SIGUSR1), (60.0, None)])
def test_a_second_signal_ends_the_process_at_once_unless_it_is_the_same_one(same_s: float, code: int | None) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=wait_in_a_library, args=(same_s, theirs))
    process.start()
    assert process.pid is not None
    try:
        assert ours.recv() == "ready"
        os.kill(process.pid, signal.SIGTERM)
        assert ours.recv() == signal.SIGTERM
        os.kill(process.pid, signal.SIGUSR1)
        process.join(0.3 if code is None else 60)
        assert process.exitcode == code
    finally:
        process.kill()
        process.join()
