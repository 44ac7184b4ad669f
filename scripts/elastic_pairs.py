"""Load the checkpoint of every layout into every other, and compare the next steps with the unbroken run's.

    python scripts/elastic_pairs.py

A layout is a number of ranks (1, 2, 4), an EP size (1, 2, 4) and an engine. Of each pair: step and tracker
id are the saved ones; weights and optimizer state are equal to the bit; targets and learning rate of the next two steps
are the unbroken run's, and so are loss and gradient norm, to the bit on the same layout and to 1e-5 on another. The
second step's loss shows what the optimizer has made of its state; the router's noise is on in both.
"""

import argparse
import hashlib
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch.distributed.tensor import DTensor

from tests.distributed import run_distributed
from tests.end_to_end.runs import start
from tests.tiny import ENGINES, write_corpus
from twohop.trainer.checkpoints.checkpoint import CheckpointStore, load_tensors
from twohop.trainer.loop import train_step
from twohop.trainer.setup import Run

SAVED_AT = 2  # steps
NEXT = (2, 3)  # the steps that are compared, counted from 0
TOLERANCE = 1e-5
COMPARED = ("loss", "grad_norm", "lr", "targets")


class Layout(NamedTuple):
    """How many ranks, and what each does."""

    ranks: int
    ep_size: int
    engine: str

    def __str__(self) -> str:
        return f"{self.engine}-{self.ranks}-{self.ep_size}"

    def start(self, directory: Path) -> Run:
        """A fresh run of the tiny model."""
        return start(directory, f"comm.ep_size={self.ep_size}", *ENGINES[self.engine])


class Seen(NamedTuple):
    """What a run says at a checkpoint and after it."""

    step: int
    tracker_id: str
    tensors: dict[str, str]  # name -> digest
    records: list[dict[str, Any]]


def digests(run: Run) -> dict[str, str]:
    """All tensors of the state, those that are spread over ranks put together."""
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in run.state().items()}
    return {name: hashlib.sha256(t.detach().float().numpy().tobytes()).hexdigest() for name, t in whole.items()}


def next_records(run: Run) -> list[dict[str, Any]]:
    records = [train_step(run, step) for step in NEXT]
    return [{name: record[name] for name in COMPARED} for record in records]


def save(directory: Path, layout: Layout) -> Seen:
    """Train, save, and train on, unbroken."""
    run = layout.start(directory)
    for step in range(SAVED_AT):
        train_step(run, step)
    store = CheckpointStore(directory / str(layout))
    store.save(SAVED_AT, run.state(), run.identity(), f"tracker of {layout}")
    return Seen(SAVED_AT, f"tracker of {layout}", digests(run), next_records(run))


def load_all(directory: Path, layout: Layout, saved: list[Layout]) -> list[Seen]:
    """Continue from the checkpoint of each of the `saved` layouts in turn."""
    run = layout.start(directory)
    results = []
    for other in saved:
        checkpoint = CheckpointStore(directory / str(other)).latest()
        assert checkpoint is not None
        state = run.state()
        for tensor in state.values():  # so that one which is not loaded shows
            tensor.zero_()
        load_tensors(checkpoint, state, run.identity())
        run.engine.restored(state)
        loaded = digests(run)
        results.append(Seen(checkpoint.step, checkpoint.tracker_id, loaded, next_records(run)))
    return results


def compare(saved: Seen, loaded: Seen, same_layout: bool) -> tuple[float, list[str]]:
    """The largest relative difference of the next losses and norms; and what is wrong."""
    problems = []
    if loaded[:2] != saved[:2]:
        problems.append(f"step and tracker {loaded[:2]} instead of {saved[:2]}")
    problems += [f"{name} differs" for name in saved.tensors if loaded.tensors.get(name) != saved.tensors[name]][:3]
    if loaded.tensors.keys() != saved.tensors.keys():
        problems.append(f"other tensors: {sorted(loaded.tensors.keys() ^ saved.tensors.keys())[:3]}")
    worst = 0.0
    for ours, theirs in zip(loaded.records, saved.records, strict=True):
        worst = max(worst, *(abs(ours[name] / theirs[name] - 1) for name in ("loss", "grad_norm")))
        if (ours["lr"], ours["targets"]) != (theirs["lr"], theirs["targets"]):
            problems.append(f"learning rate and targets {ours} instead of {theirs}")
    if worst > (0 if same_layout else TOLERANCE):
        problems.append(f"{loaded.records} instead of {saved.records}")
    return worst, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--loaded-by", nargs="+", choices=list(ENGINES), help="of these; default: all that save")
    options = parser.parse_args()
    loaders = options.loaded_by or options.engines
    torch.set_num_threads(1)
    sizes = [(ranks, ep_size) for ranks in (1, 2, 4) for ep_size in (1, 2, 4) if ep_size <= ranks]
    layouts = [Layout(ranks, ep_size, engine) for engine in options.engines for ranks, ep_size in sizes]
    cells: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    failures = []
    with TemporaryDirectory(prefix="twohop-pairs-") as temporary:
        directory = Path(temporary)
        write_corpus(directory)
        saved = {}
        for layout in layouts:
            saved[layout] = run_distributed(save, layout.ranks, directory, layout, init=False, timeout=600)[0]
            print(f"saved by {layout}: losses {[record['loss'] for record in saved[layout].records]}", flush=True)
        for layout in (layout for layout in layouts if layout.engine in loaders):
            given = run_distributed(load_all, layout.ranks, directory, layout, layouts, init=False, timeout=600)[0]
            for other, seen in zip(layouts, given, strict=True):
                worst, problems = compare(saved[other], seen, other == layout)
                cells[other.engine, layout.engine].append((worst, other == layout))
                failures += [f"{other} loaded by {layout}: {problem}" for problem in problems]
            print(f"loaded by {layout}: {len(given)} checkpoints, {len(failures)} problems so far", flush=True)
    print("\n| saved by ╲ loaded by | " + " | ".join(loaders) + " |")
    print("|---" * (len(loaders) + 1) + "|")
    for saver in options.engines:
        row = [
            f"{len(cells[saver, loader])} pairs, {max(worst for worst, _ in cells[saver, loader]):.1e}"
            for loader in loaders
        ]
        print(f"| {saver} | " + " | ".join(row) + " |")
    on_same = [worst for pairs in cells.values() for worst, same in pairs if same]
    print(f"\n{len(on_same)} pairs of equal layout, {sum(worst == 0 for worst in on_same)} of them equal to the bit")
    print("\n".join(failures) or "all tensors are equal to the bit in every pair")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
