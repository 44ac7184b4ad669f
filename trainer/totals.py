"""What a step measured, added up over its micro-batches and over all ranks.

Shapes: E experts of a layer.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from twohop.comm import TrafficMeter
from twohop.models import MoEStats
from twohop.trainer.world import gather_objects, sum_over_world

Traffic = dict[str, dict[str, list[int]]]  # level -> phase -> [bytes, messages]


class StepTotals:
    """Sums of losses, expert loads and drops; they stay on the device until `reduce`."""

    def __init__(self, layer_names: list[str]) -> None:
        self._layer_names = layer_names
        self._experts_by_layer: list[int] = []
        self._loss_names: list[str] = []
        self._sums: Tensor | None = None  # fp64 [losses, then load_E and dropped of every layer]

    def add(self, losses: dict[str, Tensor], moe: tuple[MoEStats, ...]) -> None:
        """Add one micro-batch: each loss summed over its targets."""
        self._loss_names = list(losses)
        parts = [*losses.values()] + [part for stats in moe for part in (stats.load_E, stats.dropped)]
        sums = torch.cat([part.detach().reshape(-1).double() for part in parts])
        self._experts_by_layer = [len(stats.load_E) for stats in moe]
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(self, num_targets: int) -> dict[str, Any]:
        """Losses per target, and each layer's loads and drops as fractions, over all ranks. Every rank calls this."""
        assert self._sums is not None
        sum_over_world(self._sums, "losses")
        sums = self._sums.tolist()
        losses = {name: total / num_targets for name, total in zip(self._loss_names, sums, strict=False)}
        rest = sums[len(losses) :]
        layers = {}
        for name, num_experts in zip(self._layer_names, self._experts_by_layer, strict=True):
            load, dropped, rest = rest[:num_experts], rest[num_experts], rest[num_experts + 1 :]
            assignments = max(1.0, sum(load))
            layers[name] = {"load": [n / assignments for n in load], "dropped": dropped / assignments}
        return losses | {"moe": layers}


def traffic_of_world(meter: TrafficMeter) -> Traffic:
    """What all ranks have sent since the last reset. Every rank of the world must call this."""
    return add_traffic(gather_objects(meter.snapshot()))


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
