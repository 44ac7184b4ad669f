"""What a dispatch will take: a cost model of the levels of the network and of copying rows, and the choice by it.

A dispatch with its combine uses three kinds of resources: each level of the network, and the processor that copies,
sorts and sums rows. In one chunk they are used one after the other; with c chunks the most used one works all the
time and the others hide behind it, except for 1/c of them at the beginning and the end:

    T(c) = base + max(resources) + (sum(resources) - max(resources)) / c

The base is what a route takes to carry next to nothing: agreement, plan, latencies. Every further chunk costs its
messages again, so more chunks are not always better. All times are in seconds.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from twohop.comm.routes import ROUTES


@dataclass(frozen=True)
class LevelCost:
    """One level of the network, with all ranks sending at once."""

    message_s: float  # for each further message while others are under way
    byte_s: float  # for each byte that one rank sends


@dataclass(frozen=True)
class Workload:
    """One dispatch and combine. Symbols as in the documentation: N tokens of a rank, K experts of a token."""

    tokens: int  # N, of the rank with most
    top_k: int
    num_experts: int
    row_bytes: float  # of a row as it is computed with
    between_row_bytes: float  # of a row on a hop between nodes
    inside_row_bytes: float  # of a row on a hop inside a node
    experts_s: float = 0.0  # of the processor, for the experts of one forward pass


@dataclass(frozen=True)
class Choice:
    """A way to carry tokens, and the time that the model expects for dispatch and combine together."""

    algorithm: str
    chunks: int
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """Fitted by `twohop.comm.probe.fit_cost_model`, equal on all ranks; kept in a JSON file."""

    levels: dict[str, LevelCost]  # by name of the level: rack, node, local
    copied_byte_s: float  # to copy or add one byte of a row on its way
    exchange_s: float  # processor time of one further exchange, whatever it carries
    base_s: dict[str, float]  # by route: dispatch and combine of next to nothing, in one chunk

    def predict(self, work: Workload, block: Sequence[tuple[str, int]], algorithm: str, chunks: int) -> float:
        """Seconds of dispatch and combine. `block` is the EP group's grid: (level name, ranks along it), outermost
        first, as in `Topology.axes`; routing is taken as uniform.
        """
        block = [(name, size) for name, size in block if size > 1]
        rows = [work.tokens * distinct_subtrees(work, block[: i + 1]) for i in range(len(block))]
        busy = dict.fromkeys([name for name, _ in block], 0.0)
        copied = 2 * work.tokens * work.top_k * work.row_bytes
        processor, depth = 0.0, -1
        for hop in ROUTES[algorithm](len(block)) if block else []:
            depth = max((depth, *hop.spread))
            copied += 2 * rows[depth] * work.row_bytes
            processor += 2 * (chunks - 1) * self.exchange_s
            # An exchange has one format: what flat sends inside a node is encoded as what it sends to others.
            crosses = any(block[axis][0] != "local" for axis in hop.exchange)
            wire_bytes = work.between_row_bytes if crosses else work.inside_row_bytes
            for name, messages, share in traffic_of_hop(block, hop.exchange):
                level = self.levels[name]
                busy[name] += 2 * rows[depth] * share * wire_bytes * level.byte_s
                busy[name] += 2 * (chunks - 1) * messages * level.message_s
        processor += copied * self.copied_byte_s + work.experts_s
        resources = [*busy.values(), processor]
        longest = max(resources)
        return self.base_s[algorithm] + longest + (sum(resources) - longest) / chunks

    def choose(
        self, work: Workload, block: Sequence[tuple[str, int]], algorithms: Iterable[str], chunks: Iterable[int]
    ) -> Choice:
        """The fastest way by this model; the first one among equals, so that all ranks choose alike."""
        chunks = list(chunks)
        choices = [Choice(a, c, self.predict(work, block, a, c)) for a in algorithms for c in chunks]
        return min(choices, key=lambda choice: choice.seconds)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "CostModel":
        """Read what `save` wrote; a ValueError names the file and what is wrong with it."""
        try:
            values = json.loads(path.read_text())
            levels = {name: LevelCost(**level) for name, level in values.pop("levels").items()}
            model = cls(levels=levels, **values)
            numbers = [model.copied_byte_s, model.exchange_s, *(model.base_s[name] for name in ROUTES)]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"cost file {path} cannot be read ({error}): name a file written by a probe") from error
        numbers += [number for level in levels.values() for number in asdict(level).values()]
        if not all(isinstance(number, int | float) and math.isfinite(number) and number >= 0 for number in numbers):
            raise ValueError(f"cost file {path} holds a time that is negative or no number: probe again")
        return model


def distinct_subtrees(work: Workload, outer: Sequence[tuple[str, int]]) -> float:
    """Expected number of distinct subtrees below `outer` that a token with uniform top-K touches (DeepEP's Dn)."""
    subtrees = math.prod(size for _, size in outer)
    others = work.num_experts - work.num_experts // subtrees
    missed = math.comb(others, work.top_k) / math.comb(work.num_experts, work.top_k)
    return subtrees * (1 - missed)


def traffic_of_hop(block: Sequence[tuple[str, int]], axes: Sequence[int]) -> list[tuple[str, int, float]]:
    """(level, messages of a rank, share of its rows) for each level that an exchange along `axes` uses."""
    peers = math.prod(block[axis][1] for axis in axes)
    result, inner = [], peers
    for axis in axes:
        name, size = block[axis]
        messages = inner - inner // size  # peers that differ on this axis and agree on the outer ones
        inner //= size
        result.append((name, messages, messages / peers))
    return result
