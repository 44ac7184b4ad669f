"""What a step measured, added up over its micro-batches and over all ranks.

Shapes: E experts of a layer.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twohop.models import MoEStats
from twohop.trainer.world import max_over_world, sum_over_world

Traffic = dict[str, dict[str, list[int]]]  # level -> phase -> [bytes, messages]


# Of MoEStats.
SUMMED = ("load_E", "dropped", "need", "repeated", "compared", "replayed", "tokens", "top_weight")


class StepTotals:
    """Sums of losses and of the MoE layers' statistics; they stay on the device until `reduce`."""

    def __init__(self, layer_names: list[str]) -> None:
        self._layer_names = layer_names
        self._sizes: list[int] = []  # of what is summed of each layer, one after the other
        self._loss_names: list[str] = []
        self._sums: Tensor | None = None  # fp64 [micro-batches, losses, then SUMMED of every layer]
        self._rows: Tensor | None = None  # int64 [layers], the largest

    def add(self, losses: dict[str, Tensor], moe: tuple[MoEStats, ...]) -> None:
        """Add one micro-batch: each loss summed over its targets."""
        self._loss_names = list(losses)
        of_layers: list[Tensor] = [getattr(stats, name) for stats in moe for name in SUMMED]
        self._sizes = [part.numel() for part in of_layers]
        parts = [torch.ones_like(losses["loss"]), *losses.values(), *of_layers]
        sums = torch.cat([part.detach().reshape(-1).double() for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        if moe:
            rows = torch.stack([stats.rows for stats in moe])
            self._rows = rows if self._rows is None else self._rows.maximum(rows)

    def reduce(self, num_targets: int) -> dict[str, Any]:
        """Losses per target, and what each layer did, over all ranks. Every rank calls this.

        Of a layer: `load` and `dropped` as fractions of its assignments; what `_balance` says of the load; the
        `confidence` of its router, the mean over tokens of the largest weight of their experts; the largest `capacity`
        factor that was in use in the step, and the `slots` that a system that pads would have allocated with it for
        all micro-batches. With an assignment cache, once samples come again, also the fraction of micro-batches that
        were `replayed`, and of assignments that `repeated`, where there was something to compare.
        """
        assert self._sums is not None
        sum_over_world(self._sums, "losses")
        if self._rows is not None:
            max_over_world(self._rows, "capacity")
        micro_batches, *sums = self._sums.tolist()
        losses = {name: total / num_targets for name, total in zip(self._loss_names, sums, strict=False)}
        layers = zip(self._layer_names, self.layers(), strict=True)
        return losses | {"moe": {name: _record(total, micro_batches) for name, total in layers}}

    @property
    def micro_batches(self) -> int:
        """After `reduce`: of all ranks."""
        assert self._sums is not None
        return int(self._sums[0])

    def layers(self) -> list[MoEStats]:
        """After `reduce`: each layer's statistics of the global batch: the largest `rows`, and fp64 sums."""
        assert self._sums is not None
        parts = iter(self._sums[1 + len(self._loss_names) :].split(self._sizes))
        layers = []
        for rows in [] if self._rows is None else self._rows:
            summed = {name: next(parts) if name == "load_E" else next(parts)[0] for name in SUMMED}
            layers.append(MoEStats(losses={}, rows=rows, **summed))
        return layers


def _record(total: MoEStats, micro_batches: float) -> dict[str, Any]:
    load, rows = total.load_E.tolist(), int(total.rows)
    assignments, slots = max(1.0, sum(load)), len(load) * rows * micro_batches
    record: dict[str, Any] = {"load": [n / assignments for n in load], "dropped": float(total.dropped) / assignments}
    record |= {"capacity": slots / assignments, "slots": int(slots)}
    record |= _balance(record["load"])
    record["confidence"] = float(total.top_weight / total.tokens) if total.tokens else None
    if total.compared:
        record["repeated"] = float(total.repeated / total.compared)
    if total.compared or total.replayed:
        record["replayed"] = float(total.replayed) / micro_batches
    return record


def _balance(load: list[float]) -> dict[str, float | None]:
    """How even a load is; None for all where the layer was left out of the step.

    `entropy`: of the load, divided by that of a balanced one: 1 is balanced, 0 is one expert alone. `max_violation`:
    (largest - mean) / mean (Wang 2024, auxiliary-loss-free load balancing). `dead`: experts that got nothing.
    """
    if not any(load):
        return dict.fromkeys(("entropy", "max_violation", "dead"))
    entropy = sum(-part * math.log(part) for part in load if part) / math.log(len(load)) if len(load) > 1 else 1.0
    return {"entropy": entropy, "max_violation": max(load) * len(load) - 1, "dead": load.count(0)}


def add_traffic(snapshots: list[Any]) -> Traffic:
    """Sums over snapshots, each {level: {phase: (bytes, messages)}}; a phase may be missing in some."""
    total: Traffic = {}
    for snapshot in snapshots:
        for level, phases in snapshot.items():
            for phase, pair in phases.items():
                so_far = total.setdefault(level, {}).get(phase, [0, 0])
                total[level][phase] = add_pairs([so_far, pair])
    return total


def add_pairs(pairs: Iterable[Sequence[int]]) -> list[int]:
    """[bytes, messages] of several, each added up."""
    return [sum(column) for column in zip([0, 0], *pairs, strict=True)]
