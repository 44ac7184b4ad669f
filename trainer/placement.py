"""Experts move to where load and friends are, at a step boundary, with their optimizer state (`placement=…`).

A layer's tokens are looked at as they are routed. Every few steps a new placement is decided from the last ones, and
rows of experts go to their new slots, moments and all. Routers, losses and checkpoints know experts by number and see
nothing of it. The experts with the most tokens can have shadows on all ranks (`placement.shadows`).
"""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twohop.comm import TrafficMeter
from twohop.comm.move import move_rows
from twohop.comm.placement import Indices, Quality, Sample, hottest, place, quality
from twohop.comm.wire import format_of
from twohop.comm.wiring import Direction
from twohop.models.moe import MoELayer
from twohop.models.shadows import Shadows
from twohop.trainer.config import Config
from twohop.trainer.engines import Engine
from twohop.trainer.world import exchanging, gather_objects, rank, say, world_size

WORTH_IT = 0.01  # a move must make what it is for better by this part


class Placement:
    """The experts of one model. Every rank of the world must call `after_step`, after the same steps."""

    def __init__(self, engine: Engine, config: Config, meter: TrafficMeter | None = None) -> None:
        self.engine, self.config, self.meter = engine, config.placement, meter
        self.shares = "node" if config.comm.dispatcher in ("dedup", "auto") else "rank"
        if config.comm.sums_at_home:
            self.shares = "expert"
        formats = [format_of(config.comm.wire, direction, crosses_nodes=True) for direction in Direction]
        self.row_bytes = sum(wire.row_bytes(config.model.dim, torch.float32) for wire in formats)
        self._seen: dict[str, Tensor] = {}  # layer -> ids [T, K], the newest first
        if self.config.follows_load:
            for name, layer in engine.model.moe_layers():
                layer.observe = partial(self._observe, name)

    def _observe(self, name: str, ids_NK: Tensor) -> None:
        seen = [ids_NK, self._seen[name]] if name in self._seen else [ids_NK]
        self._seen[name] = torch.cat(seen)[: -(-self.config.sample // world_size())]

    def after_step(self, done: int) -> dict[str, Any] | None:
        """Decide and move, if it is time after `done` steps; returns a record for metrics.jsonl, and rank 0 tells.

        Of each layer the record has how many experts moved, which have shadows, and before and after: rows that a
        token sends between nodes, their bytes forward and backward, and the load of the fullest rank ÷ mean, all as
        of the sample.

        Raises CommError if a rank died or did not answer.
        """
        if not self._seen or done % self.config.every:
            return None
        started = time.perf_counter()
        layers = {name: layer for name, layer in self.engine.model.moe_layers() if name in self._seen}
        samples = gather_objects(
            [(_node(layer), self._seen[name].int().cpu().numpy()) for name, layer in layers.items()]
        )
        decided = None
        if rank() == 0:
            decided = [
                self._decide(layer, [of_rank[i] for of_rank in samples]) for i, layer in enumerate(layers.values())
            ]
        record, rows = {}, gather_objects(decided)[0]
        assert rows is not None
        changed = False
        for (name, layer), (slots_E, shadowed, before, after) in zip(layers.items(), rows, strict=True):
            moved = int((slots_E != _slots(layer)).sum())
            if moved:
                self._move(layer, torch.from_numpy(slots_E))
            if moved or shadowed != _shadowed(layer):
                changed = True
                slots = sorted(slots_E[shadowed].tolist())
                layer.shadows = Shadows(slots, layer.dispatcher, self.meter) if slots else None
            entries = {"before": self._entry(before), "after": self._entry(after)}
            record[name] = {"moved": moved, "shadowed": shadowed, **entries}
        self._seen.clear()
        seconds = time.perf_counter() - started
        if changed:
            say(f"step {done}: {_in_words(record)}, in {seconds:.2f} s")
        return {"layers": record, "seconds": seconds}

    def _decide(
        self, layer: MoELayer, seen: list[tuple[int, np.ndarray]]
    ) -> tuple[Indices, list[int], Quality, Quality]:
        """Slots and shadowed experts, as they were unless others are better, and what both mean for the sample."""
        ids_TK = np.concatenate([ids for _, ids in seen]).astype(np.int64)
        node_T = np.concatenate([np.full(len(ids), node) for node, ids in seen])
        sample = Sample(ids_TK, node_T, layer.dispatcher.num_experts)
        block, now_E, shadowed_now = _block(layer), _slots(layer), _shadowed(layer)
        load_E, together_EE = sample.load(), sample.together()
        shadowed = hottest(load_E, self.config.shadows)
        load_E[shadowed] = together_EE[shadowed] = together_EE[:, shadowed] = 0
        slots_E = place(self.config.name, load_E, together_EE, block)
        before = quality(sample, now_E, block, self.shares, shadowed_now)
        after = quality(sample, slots_E, block, self.shares, shadowed)
        key = "crossing_rows" if self.config.name == "affinity" and block[0] > 1 else "rank_load"
        if getattr(after, key) > (1 - WORTH_IT) * getattr(before, key):
            return now_E, shadowed_now, before, before
        return slots_E, shadowed, before, after

    def _move(self, layer: MoELayer, slots_E: Tensor) -> None:
        before_E, topology = torch.from_numpy(_slots(layer)), layer.dispatcher.topology
        with exchanging("placement of experts"):
            self.engine.move_experts(layer, partial(move_rows, before_E=before_E, after_E=slots_E, topology=topology))
        layer.slots_E = slots_E.to(next(layer.experts.parameters()).device)

    def _entry(self, found: Quality) -> dict[str, float]:
        rows = found.crossing_rows
        return {"rows_between_nodes": rows, "bytes_between_nodes": rows * self.row_bytes, "rank_load": found.rank_load}


def _slots(layer: MoELayer) -> Indices:
    if layer.slots_E is None:
        return np.arange(layer.dispatcher.num_experts)
    slots_E: Indices = layer.slots_E.cpu().numpy()
    return slots_E


def _shadowed(layer: MoELayer) -> list[int]:
    """Numbers of the experts, ascending."""
    if layer.shadows is None:
        return []
    expert_of_slot = np.argsort(_slots(layer))
    return sorted(expert_of_slot[list(layer.shadows.slots)].tolist())


def _block(layer: MoELayer) -> tuple[int, int]:
    """(nodes, ranks of each) of the layer's EP group."""
    *outer, local = layer.dispatcher.topology.block
    return int(np.prod(outer)), local


def _node(layer: MoELayer) -> int:
    return layer.dispatcher.topology.ep_rank // _block(layer)[1]


def _in_words(record: dict[str, Any]) -> str:
    moved = sum(entry["moved"] for entry in record.values())
    means = {
        when: [np.mean([entry[when][key] for entry in record.values()]) for key in ("rows_between_nodes", "rank_load")]
        for when in ("before", "after")
    }
    (rows, load), (later_rows, later_load) = means["before"], means["after"]
    shadowed = sum(len(entry["shadowed"]) for entry in record.values())
    shadows = f", {shadowed} shadowed" if shadowed else ""
    crossing = f"a token sends {rows:.2f} → {later_rows:.2f} rows between nodes, " if rows else ""
    return (
        f"{moved} experts moved{shadows}; {crossing}the fullest rank has {load:.2f} → {later_load:.2f} of the mean load"
    )
