"""The workers of scripts/soak.py: trained under torch's elastic agent, watched through what they write down.

They are forked from a process that has imported everything, so that a restart takes seconds.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from twohop.trainer import cli, loop

PRELOADED = [
    "twohop.trainer.launching.workers",
    "twohop.trainer.commands.train",
    "torch._dynamo",
]  # optimizers import the last
PATIENCE_S = 300.0  # for anything that should happen within seconds


class History:
    """What every rank of every attempt has done: a file for each, with its process id and a line for each step."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, attempt: int, rank: int | str) -> Path:
        return self.directory / f"{attempt:06d}-{rank}.jsonl"

    def newest(self) -> int:
        """The number of the last start of the workers; -1 before the first."""
        return max((int(path.name[:6]) for path in self.directory.glob("*.jsonl")), default=-1)

    def steps(self, attempt: int, rank: int = 0) -> int:
        """How many steps a rank has taken since it was started."""
        path = self.path(attempt, rank)
        return max(0, path.read_text().count("\n") - 1) if path.exists() else 0

    def process(self, attempt: int, rank: int) -> int:
        return int(self.path(attempt, rank).read_text().split("\n")[0])

    def final(self) -> tuple[dict[int, list[int]], int]:
        """The samples that the model saw in each step when it was last taken; how often steps were taken before."""
        seen: dict[int, dict[int, list[int]]] = {}  # step -> attempt -> samples of all ranks
        for path in sorted(self.directory.glob("*.jsonl")):
            for line in path.read_text().split("\n")[1:-1]:
                step, samples = json.loads(line)
                seen.setdefault(step, {}).setdefault(int(path.name[:6]), []).extend(samples)
        return {step: of[max(of)] for step, of in seen.items()}, sum(len(of) - 1 for of in seen.values())


def work(overrides: list[str], history: History) -> None:
    """`twohop train` as one rank, which notes the samples that go into its model. The process exits as that does."""
    path = history.path(int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"])
    take_step = loop.train_step
    with path.open("w") as file:
        print(os.getpid(), file=file, flush=True)

        def note_and_take_step(run: Any, step: int) -> dict[str, Any]:
            seen: list[int] = []

            def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
                seen.extend(inputs["sample_B"].tolist())

            hook = run.model.register_forward_pre_hook(note, with_kwargs=True)
            record = take_step(run, step)
            hook.remove()
            print(json.dumps([step, seen]), file=file, flush=True)  # from here on it survives SIGKILL
            return record

        loop.train_step = note_and_take_step
        code = cli.run(["train", *overrides])
    if code:
        sys.exit(code)


def train(overrides: list[str], history: History, ranks: int, logs: Path) -> None:
    """Run workers until they have finished, and start all again whenever one ends otherwise.

    Call it in the main thread, whose signal handlers it borrows. Raises `ChildFailedError` if they never finish.
    """
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="soak",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"is_host": True},
        local_addr="127.0.0.1",
        max_restarts=1000,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    multiprocessing.set_forkserver_preload(PRELOADED)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        elastic_launch(agent, work)(overrides, history)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def strike(kind: str, victims: list[int], restarted: Callable[[], bool]) -> None:
    """Do `kind` to the first of two processes, or to both, and wait until all workers were started again for it."""
    if kind.startswith("frozen"):
        os.kill(victims[0], signal.SIGSTOP)
        if kind == "frozen for a moment":
            time.sleep(0.5)
        else:
            wait_until(lambda: not is_running(victims[1]), "the others to give the frozen one up")
        os.kill(victims[0], signal.SIGCONT)
    else:
        for victim in victims if kind.endswith("to two") else victims[:1]:
            os.kill(victim, getattr(signal, kind.split()[0]))
    if kind != "frozen for a moment":
        wait_until(restarted, f"workers to be started again after {kind}")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Raises a TimeoutError that names `what` after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE_S:g} s for {what}")
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that has may wait as a zombie for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
