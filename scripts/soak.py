"""Kill, freeze and stop random workers of a training again and again, and compare its end with an unbroken run's.

    python scripts/soak.py --rounds 50 --seed 0

The workers run `twohop train resume=auto` under torch's elastic agent, as those of `torchrun --max-restarts` do. The
run is one epoch long. At the end every sample must have been seen exactly once in the steps that count, which are the
last ones taken of each number, and every loss must be the unbroken run's to the bit.
"""

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from soak_workers import History, strike, train, wait_until  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402

from tests.tiny import tiny_config, tiny_overrides  # noqa: E402
from twohop.trainer.data import build_data  # noqa: E402
from twohop.trainer.monitoring.metrics import read_metrics, read_summary  # noqa: E402

RANKS = 4
GLOBAL_BATCH = 8  # of tests.tiny
STEPS_A_ROUND = 4  # of the epoch; half of them are trained before an interruption, on average, and some are lost by it
KINDS = ("SIGKILL", "SIGKILL to two", "SIGTERM", "SIGUSR1", "frozen until given up", "frozen for a moment")
SAME = ("step", "kind", "loss", "grad_norm", "lr", "valid_loss", "valid_accuracy")  # of a record, in both runs


@dataclass
class Outcome:
    """What came of a soak."""

    problems: list[str] = field(default_factory=list)
    rounds: Counter[str] = field(default_factory=Counter)  # by kind
    starts: int = 0  # of all workers together
    steps: int = 0
    repeated: int = 0  # steps that were taken once more
    samples: int = 0
    valid_loss: float = 0.0
    seconds: float = 0.0


def torment(history: History, rounds: int, seed: int, ranks: int, outcome: Outcome) -> None:
    """After a random number of steps, do something to a random worker; `rounds` times."""
    chance = random.Random(seed)
    try:
        for number in range(rounds):
            steps, kind = chance.randint(1, STEPS_A_ROUND), chance.choice(KINDS)
            attempt = wait_for_steps(history, steps)
            victims = [history.process(attempt, rank) for rank in chance.sample(range(ranks), 2)]
            time.sleep(chance.random() * 0.05)  # somewhere within a step
            strike(kind, victims, restarted=lambda attempt=attempt: history.newest() > attempt)
            outcome.rounds[kind] += 1
            print(f"round {number}: {kind} after {steps} steps of start {attempt}", flush=True)
    except (TimeoutError, ProcessLookupError) as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")


def wait_for_steps(history: History, steps: int) -> int:
    """Wait until the newest workers have taken so many steps from now on; the number of their start."""
    at_first = history.newest()
    before = history.steps(at_first)

    def trained() -> bool:
        newest = history.newest()
        return newest >= 0 and history.steps(newest) >= steps + (before if newest == at_first else 0)

    wait_until(trained, f"{steps} steps")
    return history.newest()


def judge_samples(history: dict[int, list[int]], samples: int) -> list[str]:
    """What is wrong with the history of one epoch of so many samples."""
    steps = samples // GLOBAL_BATCH
    problems = [f"step {step} was not taken" for step in range(steps) if step not in history]
    counts = Counter(sample for seen in history.values() for sample in seen)
    never = [sample for sample in range(samples) if counts[sample] == 0]
    again = [sample for sample in counts if counts[sample] > 1]
    if never or again:
        problems.append(f"samples never seen: {never[:9]}, seen more than once: {again[:9]}")
    return problems


def judge_records(broken: Path, unbroken: Path) -> list[str]:
    """Where two runs differ in what must be the same to the bit."""
    one, other = ([{key: r.get(key) for key in SAME} for r in read_metrics(run)] for run in (broken, unbroken))
    if len(one) != len(other):
        return [f"{len(one)} records, but {len(other)} in the unbroken run"]
    return [f"{a} instead of {b}" for a, b in zip(one, other, strict=True) if a != b][:3]


def write_corpus(directory: Path, steps: int) -> int:
    """A text of random letters whose training split fills about so many steps, and whole ones; how many samples."""
    draw, text = random.Random(0), directory / "corpus.txt"
    config = tiny_config(directory, f"data.files=[{text}]")
    seq_len, letters = config.train.seq_len, "abcdefgh .\n"
    length = int(steps * GLOBAL_BATCH * seq_len / (1 - config.data.valid_fraction))
    while True:
        text.write_text("".join(draw.choices(letters, k=length)))
        samples = len(build_data(config.data, seq_len, log=lambda _: None).train)
        if samples % GLOBAL_BATCH == 0:
            return samples
        length += seq_len


def soak(directory: Path, rounds: int, seed: int, ranks: int = RANKS) -> Outcome:
    """A run of one epoch with `rounds` interruptions, and one without."""
    started, outcome = time.monotonic(), Outcome()
    outcome.samples = write_corpus(directory, STEPS_A_ROUND * (rounds + 2))
    outcome.steps = outcome.samples // GLOBAL_BATCH
    overrides = [
        *tiny_overrides(directory),
        f"train.steps={outcome.steps}",
        "model.num_layers=2",
        "model.moe.experts=[4]",
        "comm.timeout_s=10",
        "checkpoint.every=2",
        "generate.max_new_tokens=0",
        "checkpoint.asynchronous=true",
        "resume=auto",
    ]
    broken, unbroken = (directory / name for name in ("broken", "unbroken"))
    history = History(broken / "history")
    threading.Thread(target=torment, args=(history, rounds, seed, ranks, outcome), daemon=True).start()
    try:
        train([*overrides, f"run.dir={broken}"], history, ranks, directory / "logs")
        train([*overrides, f"run.dir={unbroken}"], History(unbroken / "history"), ranks, directory / "logs")
    except ChildFailedError as error:
        return Outcome([*outcome.problems, f"the workers failed: {error}"])
    outcome.starts = history.newest() + 1
    if (done := outcome.rounds.total()) < rounds:
        outcome.problems.append(f"the run ended after {done} of {rounds} rounds")
    final, outcome.repeated = history.final()
    outcome.problems += judge_samples(final, outcome.samples)
    outcome.problems += judge_records(broken, unbroken)
    outcome.valid_loss, other = (read_summary(run).get("valid_loss", 0.0) for run in (broken, unbroken))
    if outcome.valid_loss != other:
        outcome.problems.append(f"validation loss {outcome.valid_loss}, but {other} in the unbroken run")
    outcome.seconds = time.monotonic() - started
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="an empty folder for runs, logs and history, which stay there")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the process that workers are forked from reads it when it starts
    with TemporaryDirectory(prefix="twohop-soak-") as temporary:
        directory = options.keep or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        outcome = soak(directory.resolve(), options.rounds, options.seed)
    print("\n| interruption | rounds |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {outcome.rounds[kind]} |")
    print(
        f"\n{outcome.starts} starts of {RANKS} workers; {outcome.steps} steps, {outcome.repeated} of them again; "
        f"{outcome.samples} samples; validation loss {outcome.valid_loss!r}; {outcome.seconds:.0f} s"
    )
    print("\n".join(outcome.problems) or "every sample was seen once, and every loss is the unbroken run's to the bit")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
