"""Inject random faults into a small job and judge what the surviving ranks say.

    python scripts/faults.py --faults 120 --seed 0

Kind, culprit, layer, phase, algorithm, chunks, layout and size of the world (2 to 8 ranks) are drawn from the seed; a
fault is repeated by its own seed: --faults 1 --seed SEED. Ends with a table, and with exit code 1 if any survivor
hung, aborted, was too late or failed to name the culprit. Kinds are those of tests/comm/faults.py; the ranks are
processes of this machine that stay warm from one fault to the next.
"""

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.comm.faults import ASTRAY, BARE, LAYERS, LOST, PHASES, Fault, accused, judge, run_fault

ROUTES = ("flat", "hierarchical", "dedup")


@dataclass(frozen=True)
class Verdict:
    """What came of one fault."""

    problems: list[str]
    first: int  # survivors whose message names the culprit first, and alone
    survivors: int
    seconds: float  # until the last survivor raised


def draw(seed: int) -> Fault:
    chance = random.Random(seed)
    world = chance.choice([2, 3, 4, 4, 6, 8])
    ranks_per_node = chance.choice([size for size in range(1, world + 1) if world % size == 0])
    kinds = [*LOST, *ASTRAY, *BARE]
    # Between two flat layouts there is no difference to be found.
    if ranks_per_node in (1, world):
        kinds.remove("other algorithm")
    kind = chance.choice(kinds)
    return Fault(
        kind=kind,
        world=world,
        culprit=chance.randrange(world),
        ranks_per_node=ranks_per_node,
        algorithm=chance.choice(ROUTES),
        chunks=chance.choice([1, 1, 2, 3]),
        layer=chance.randrange(LAYERS),
        phase=chance.choice(PHASES),
    )


def inject(fault: Fault) -> Verdict:
    started = time.monotonic()
    try:
        answers: list[dict[str, Any] | None] = run_fault(fault)
    except Exception as error:  # a rank that died of itself or gave no answer: the worst of all outcomes
        return Verdict([f"{type(error).__name__}: {error} ({asdict(fault)})"], 0, 0, time.monotonic() - started)
    survivors = [given for rank, given in enumerate(answers) if rank != fault.culprit and given is not None]
    first = sum(accused(given["message"])[:1] == [{fault.culprit}] for given in survivors)
    seconds = max(given["seconds"] for given in survivors)
    return Verdict(judge(fault, answers), first, len(survivors), seconds)


def show(by_kind: dict[str, list[Verdict]]) -> None:
    print("\n| fault | injected | survivors | named the culprit | first and alone | median s | longest s |")
    print("|---|---|---|---|---|---|---|")
    everything = [verdict for verdicts in by_kind.values() for verdict in verdicts]
    for kind, verdicts in [*sorted(by_kind.items()), ("all", everything)]:
        survivors = sum(verdict.survivors for verdict in verdicts)
        failed = sum(bool(verdict.problems) for verdict in verdicts)
        seconds = [verdict.seconds for verdict in verdicts]
        named = f"{survivors}" if not failed else f"not in {failed} faults"
        print(
            f"| {kind} | {len(verdicts)} | {survivors} | {named} | {sum(verdict.first for verdict in verdicts)} "
            f"| {statistics.median(seconds):.1f} | {max(seconds):.1f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the first fault; the others follow it")
    options = parser.parse_args()
    by_kind: dict[str, list[Verdict]] = defaultdict(list)
    problems = []
    for seed in range(options.seed, options.seed + options.faults):
        fault = draw(seed)
        verdict = inject(fault)
        by_kind[fault.kind].append(verdict)
        problems += [f"seed {seed}: {problem}" for problem in verdict.problems]
        outcome = "FAILED" if verdict.problems else f"{verdict.survivors} survivors named it, {verdict.first} first"
        where = f"layer {fault.layer}, {fault.phase}, {fault.algorithm} in {fault.chunks} chunks"
        layout = f"rank {fault.culprit} of {fault.world // fault.ranks_per_node} x {fault.ranks_per_node}"
        print(f"seed {seed}: {fault.kind}: {layout}, {where}: {outcome}, {verdict.seconds:.1f} s", flush=True)
    show(by_kind)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
