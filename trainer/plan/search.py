"""The best of EP sizes, engine, recomputation, dispatcher, chunks, wire and micro-batch, and what others would cost."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from twohop.comm.shipment import Shipment
from twohop.comm.simulate import Simulated, simulate
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.config.plan import PlanConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.plan.hardware import GIB
from twohop.trainer.plan.holding import Holder
from twohop.trainer.plan.memory import Memory, memory_of
from twohop.trainer.plan.steptime import Timer, Way


@dataclass(frozen=True)
class Candidate:
    """One way to train, and what it takes on each rank and in each step."""

    engine: str
    recompute: Recompute
    micro_batch: int
    accumulation: int
    ep_sizes: tuple[int, ...]  # of each MoE layer
    ways: tuple[Way, ...]
    memory: Memory
    dense_s: float  # of a step, as all that follow
    experts_s: float
    dispatch_s: float  # what dispatch and combine add to the experts
    gradients_s: float
    update_s: float

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.dense_s + self.experts_s + self.dispatch_s + self.gradients_s + self.update_s


def candidates(timer: Timer, recompute: Recompute = Recompute.none) -> Iterator[Candidate]:
    """All that divides evenly, whether it fits into memory or not."""
    config, world = timer.config, timer.config.cluster.world
    engines = [engine for engine in config.engines if engine not in engines_refused(config)]
    for ep_sizes, engine in product(layouts(config), engines):
        holder = Holder(timer.shape, engine, ep_sizes, world, config.precision, config.optimizer)
        update_s, passes = timer.update_s(holder), timer.passes(engine, recompute, ep_sizes)
        for micro_batch in micro_batches(config):
            accumulation = config.global_batch // (micro_batch * world)
            ways = tuple(timer.ways(i, ep, micro_batch, recompute)[0] for i, ep in enumerate(ep_sizes))
            experts_s = accumulation * sum(way.experts_s for way in ways)
            dense_s = accumulation * timer.dense_s(micro_batch, recompute)
            yield Candidate(
                engine=engine,
                recompute=recompute,
                micro_batch=micro_batch,
                accumulation=accumulation,
                ep_sizes=ep_sizes,
                ways=ways,
                memory=memory_of(holder, passes, micro_batch, accumulation > 1),
                dense_s=dense_s,
                experts_s=experts_s,
                dispatch_s=accumulation * sum(way.seconds for way in ways) - experts_s,
                gradients_s=timer.gradients_s(engine, ep_sizes, accumulation, dense_s),
                update_s=update_s,
            )


def engines_refused(config: PlanConfig) -> dict[str, str]:
    """Engines that cannot train so, with the key and value that they refuse; as `twohop train` does."""
    refused = {}
    for engine in config.engines:
        if config.precision is Precision.bf16_params and engine != "ddp":
            refused[engine] = "precision=bf16_params"
        elif config.optimizer == "muon" and engine not in ("ddp", "zero0"):
            refused[engine] = "optimizer=muon"
    return refused


def micro_batches(config: PlanConfig) -> list[int]:
    """Those that make a global batch with the same number of micro-batches on every rank.

    Raises ConfigError if there is none.
    """
    world = config.cluster.world
    fitting = [size for size in config.micro_batches if config.global_batch % (size * world) == 0]
    if not fitting:
        raise ConfigError(
            f"global_batch={config.global_batch} is no multiple of {world} ranks times one of micro_batches="
            f"{config.micro_batches}: use {world * max(1, config.global_batch // world)}, or other micro_batches"
        )
    return fitting


def layouts(config: PlanConfig) -> list[tuple[int, ...]]:
    """EP sizes of all MoE layers; layers of equal numbers of experts have the same, unless they are given.

    Raises ConfigError if those that are given do not divide the ranks and the experts.
    """
    layers, world = config.model.experts_by_layer, config.cluster.world
    if config.ep_size:
        given = config.ep_size * len(layers) if len(config.ep_size) == 1 else config.ep_size
        for experts, ep_size in zip(layers, given, strict=True):
            if ep_size < 1 or world % ep_size or experts % ep_size:
                raise ConfigError(
                    f"ep_size={ep_size} does not divide both the {world} ranks and the {experts} experts of "
                    f"a layer: use one of {_divisors(math.gcd(world, experts))}, or null"
                )
        return [tuple(given)]
    sizes = sorted(set(layers))
    found = []
    for chosen in product(*(_divisors(math.gcd(size, world)) for size in sizes)):
        of_size = dict(zip(sizes, chosen, strict=True))
        found.append(tuple(of_size[experts] for experts in layers))
    return found


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class Found:
    """The best candidate, and for each choice the best with each other value: None if none fits."""

    best: Candidate
    refused: dict[str, str]  # engine -> why
    others: dict[str, dict[Any, Candidate | None]]  # choice -> value -> candidate


def search(timer: Timer) -> Found:
    """The candidate that fits and takes the shortest step; of equal ones the one with most memory left.

    Recomputation only ever takes longer: as soon as the fastest of all candidates fits, more of it is not looked at.
    Raises ConfigError if none fits.
    """
    room = (timer.gpu.memory_gib - timer.config.cluster.reserve_gib) * GIB
    everything: list[Candidate] = []
    fitting: list[Candidate] = []
    for recompute in sorted(timer.config.recompute, key=list(Recompute).index):
        added = list(candidates(timer, recompute))
        everything += added
        fitting += [candidate for candidate in added if candidate.memory.peak <= room]
        fastest_s = min(candidate.step_s for candidate in added)
        if any(candidate.step_s <= fastest_s for candidate in fitting):
            break
    if not fitting:
        least = min(everything, key=lambda candidate: candidate.memory.peak)
        raise ConfigError(
            f"nothing fits into the {room / GIB:.1f} GiB of cluster.gpu={timer.config.cluster.gpu}: the least is "
            f"{least.memory.peak / GIB:.1f} GiB, with {least.engine}, recompute={least.recompute.value}, "
            f"micro_batch={least.micro_batch} and EP {'/'.join(map(str, sorted(set(least.ep_sizes))))}; use more "
            "nodes, or a smaller model"
        )

    def rank(candidate: Candidate) -> tuple[float, float]:
        return candidate.step_s, candidate.memory.peak

    choices: dict[str, Callable[[Candidate], Any]] = {
        "engine": lambda c: c.engine,
        "recompute": lambda c: c.recompute.value,
        "micro-batch": lambda c: c.micro_batch,
    }
    for size in sorted({layer.num_experts for layer in timer.shape.layers}):
        index = next(i for i, layer in enumerate(timer.shape.layers) if layer.num_experts == size)
        choices[f"EP of {size} experts"] = partial(_ep_size, index)
    others: dict[str, dict[Any, Candidate | None]] = {}
    for name, value_of in choices.items():
        values = dict.fromkeys(map(value_of, everything))
        others[name] = {
            value: min((c for c in fitting if value_of(c) == value), key=rank, default=None) for value in values
        }
    return Found(min(fitting, key=rank), engines_refused(timer.config), others)


def _ep_size(layer: int, candidate: Candidate) -> int:
    return candidate.ep_sizes[layer]


def replay(timer: Timer, candidate: Candidate) -> list[Simulated]:
    """Each MoE layer's dispatch and combine of one micro-batch, simulated message by message; equal layers once."""
    done: dict[tuple, Simulated] = {}
    results = []
    for way, ep_size in zip(candidate.ways, candidate.ep_sizes, strict=True):
        key = (way, ep_size)
        if key not in done:
            block = timer.block(ep_size)
            shipment = Shipment.expected(way.work, block, way.algorithm, way.chunks, timer.levels[1])
            done[key] = simulate(shipment, timer.network, way.work)
        results.append(done[key])
    return results
