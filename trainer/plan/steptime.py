"""Seconds of a step: arithmetic, dispatch by the cost model of `comm=auto`, sums of gradients, optimizer.

What `recompute` multiplies and carries again is counted by the same passes that count memory. Muon's iterations are
counted too: five times three products for each matrix, on every rank that holds it.

Assumed, beside what `twohop.comm.cost` and `twohop.comm.simulate` assume: matrix products reach
`cluster.efficiency` of the peak; routing is uniform, but that all wait for the experts of the busiest rank
(`rank_load`); ddp and DeepSpeed sum gradients after the last backward pass, as they do here, and FSDP beside the
arithmetic of the dense parts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from twohop.comm.cost import CostModel, Workload
from twohop.comm.network import Network
from twohop.comm.simulate import cost_model
from twohop.comm.topology import ep_block
from twohop.comm.wire import FORMATS
from twohop.trainer.config import Precision, Recompute
from twohop.trainer.config.plan import PlanConfig
from twohop.trainer.plan.hardware import GPUS, network_of
from twohop.trainer.plan.holding import NUMBER, Holder
from twohop.trainer.plan.memory import precision_of_passes
from twohop.trainer.plan.passes import Passes, passes
from twohop.trainer.plan.shape import LayerShape, ModelShape

Block = tuple[int, int]
Loads = tuple[float, ...]  # of each MoE layer
# AdamW reads weight, gradient and two moments of a number, and writes all but the gradient; Muon has one moment.
UPDATE_BYTES = {"adamw": 7 * NUMBER, "muon": 5 * NUMBER}
MUON_ITERATIONS = 5  # as torch's Muon


@dataclass(frozen=True)
class Way:
    """How one layer's tokens travel, and what its dispatch, experts and combine take for one micro-batch."""

    algorithm: str
    chunks: int
    wire: str
    work: Workload
    forward_s: float
    backward_s: float
    repeated: float  # the part of the experts' forward products that is computed again

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s

    @property
    def experts_s(self) -> float:
        """Of both passes, if nothing were in their way."""
        return (3 + self.repeated) * self.work.experts_s


class Timer:
    """Times of one model on one cluster."""

    def __init__(self, config: PlanConfig, shape: ModelShape, measured: CostModel | None = None) -> None:
        self.config, self.shape, self.measured = config, shape, measured
        self.gpu, self.network = GPUS[config.cluster.gpu], network_of(config.cluster)
        self.levels = (config.cluster.nodes, config.cluster.gpus_per_node)
        is_fp32 = config.precision is Precision.fp32
        self.peak_flops = self.gpu.fp32_flops if is_fp32 else self.gpu.bf16_flops
        self.flops = self.peak_flops * config.cluster.efficiency
        self.expert_flops = self.flops
        if config.fp8_experts:
            assert self.gpu.fp8_flops is not None  # the command has looked
            self.expert_flops = self.gpu.fp8_flops * config.cluster.efficiency
        self._ways: dict[tuple, list[Way]] = {}
        self._passes: dict[tuple[Precision, Recompute, Loads], Passes] = {}
        self._models: dict[Block, CostModel] = {}

    def block(self, ep_size: int) -> Block:
        """(nodes, ranks of each) of an EP group."""
        nodes, local = ep_block(self.levels, ep_size)
        return nodes, local

    @property
    def alone(self) -> tuple[int, ...]:
        """EP sizes of ranks that have all experts."""
        return (1,) * len(self.shape.layers)

    def load(self, index: int, ep_size: int) -> float:
        """Rows that come to the busiest rank's experts ÷ those of a mean rank: EP times as many at most, or C times."""
        given, capacity_factor = self.config.rank_load, self.shape.layers[index].capacity_factor
        if not given:
            return 1.0
        return min(given[index if len(given) > 1 else 0], float(ep_size), max(1.0, capacity_factor or ep_size))

    def passes(self, engine: str, recompute: Recompute, ep_sizes: Sequence[int]) -> Passes:
        """Of the busiest rank, as the engine runs the model; the first time a few seconds for a large model."""
        precision, loads = precision_of_passes(engine, self.config.precision), self._loads(ep_sizes)
        key = (precision, recompute, loads)
        if key not in self._passes:
            self._passes[key] = passes(self.shape.config, *self.config.lengths, precision, recompute, loads)
        return self._passes[key]

    def _loads(self, ep_sizes: Sequence[int]) -> Loads:
        return tuple(self.load(index, ep_size) for index, ep_size in enumerate(ep_sizes))

    def _counted(self, recompute: Recompute) -> Passes:
        """Passes with even loads, of any precision: they have the same operations."""
        wanted = (recompute, self._loads(self.alone))
        known = (passes for (_, *key), passes in self._passes.items() if tuple(key) == wanted)
        return next(known, None) or self.passes("ddp", recompute, self.alone)

    def ways(self, index: int, ep_size: int, micro_batch: int, recompute: Recompute) -> list[Way]:
        """All ways to carry the tokens of MoE layer `index`, the fastest first."""
        layer, load = self.shape.layers[index], self.load(index, ep_size)
        again = self._again(index, recompute)
        key = (layer, load, ep_size, micro_batch, again)
        if key not in self._ways:
            block = self.block(ep_size)
            if block not in self._models:
                self._models[block] = self.measured or cost_model(self.network, block, self.levels[1])
            works = [(wire, self.workload(layer, load, micro_batch, wire)) for wire in self.config.wires]
            ways = [
                self._way(self._models[block], block, algorithm, chunks, wire, work, again)
                for algorithm in self.config.dispatchers
                for chunks in self.config.chunks
                for wire, work in works
            ]
            self._ways[key] = sorted(ways, key=lambda way: way.seconds)
        return self._ways[key]

    def workload(self, layer: LayerShape, load: float, micro_batch: int, wire: str) -> Workload:
        """Of a layer's dispatch for one micro-batch; the wire is that between nodes."""
        dim, tokens = self.shape.config.dim, micro_batch * layer.tokens
        dtype = torch.bfloat16 if self.config.precision is Precision.bf16_params else torch.float32
        return Workload(
            tokens=tokens,
            top_k=layer.top_k,
            num_experts=layer.num_experts,
            row_bytes=dim * dtype.itemsize,
            between_row_bytes=FORMATS[wire].row_bytes(dim, dtype),
            inside_row_bytes=dim * dtype.itemsize,
            experts_s=load * tokens * layer.token_flops / self.expert_flops,
        )

    def _again(self, index: int, recompute: Recompute) -> tuple[float, float]:
        """Of a layer: the part of the experts' forward products, and of dispatch with combine, that is done again."""
        if recompute is Recompute.none:
            return 0.0, 0.0
        repeated, once = self._counted(recompute), self._counted(Recompute.none)
        before = once.expert_operations[index]  # of the forward pass, and as many for gradients of rows
        ways = [done[index] - 1 for done in (repeated.dispatched, repeated.combined)]
        return 2 * (repeated.expert_operations[index] / before - 1), sum(ways) / 2

    def _way(
        self,
        model: CostModel,
        block: Block,
        algorithm: str,
        chunks: int,
        wire: str,
        work: Workload,
        again: tuple[float, float],
    ) -> Way:
        axes = [("node", block[0]), ("local", block[1])]
        repeated, carried = again
        both = [work, replace(work, experts_s=(2 + repeated) * work.experts_s)]
        forward_s, backward_s = (model.predict(w, axes, algorithm, chunks) for w in both)
        backward_s += carried * model.predict(replace(work, experts_s=0.0), axes, algorithm, chunks)
        return Way(algorithm, chunks, wire, work, forward_s, backward_s, repeated)

    @cached_property
    def dense_flops(self) -> float:
        """Of a sequence, forward and backward, without experts."""
        return self.shape.sequence_flops - sum(3 * layer.tokens * layer.token_flops for layer in self.shape.layers)

    def dense_s(self, micro_batch: int, recompute: Recompute) -> float:
        """Arithmetic of a micro-batch, both passes, without experts."""
        flops = self.dense_flops
        if recompute is not Recompute.none:
            flops += self._counted(recompute).operations - self._counted(Recompute.none).operations
        return micro_batch * flops / self.flops

    def gradients_s(self, engine: str, ep_sizes: Sequence[int], accumulation: int, dense_s: float) -> float:
        """What gradients and shared parameters add to a step with `dense_s` seconds of dense arithmetic."""
        parts = [(self.shape.dense_size, self.levels)]
        for layer, ep_size in zip(self.shape.layers, ep_sizes, strict=True):
            nodes, local = self.block(ep_size)
            replicas = (self.levels[0] // nodes, self.levels[1] // local)
            parts.append((layer.num_experts // ep_size * layer.expert_size, replicas))
        # All-gather or reduce-scatter; an all-reduce is both.
        gradient = 2 if self.config.precision is Precision.bf16_params else NUMBER
        once = sum(gather_s(self.network, gradient * size, group, self.levels[1]) for size, group in parts)
        if engine == "fsdp":
            weight = NUMBER if self.config.precision is Precision.fp32 else 2
            gathered = sum(gather_s(self.network, weight * size, group, self.levels[1]) for size, group in parts)
            return max(0.0, 2 * accumulation * gathered + once - dense_s)  # for each pass of each micro-batch
        scatters = accumulation if engine == "zero2" else 1
        return (scatters + 1) * once

    def update_s(self, holder: Holder) -> float:
        """The optimizer reads and writes all that it holds; Muon multiplies, in bf16, on top."""
        seconds = 0.0
        for parameter in self.shape.parameters.values():
            muons = self.config.optimizer == "muon" and parameter.is_matrix
            numbers = holder.share(parameter)
            seconds += UPDATE_BYTES["muon" if muons else "adamw"] * numbers / self.gpu.memory_bytes_s
            if muons:
                flops = numbers / parameter.size * muon_flops(*parameter.shape)
                seconds += flops / (self.gpu.bf16_flops * self.config.cluster.efficiency)
        return seconds


def muon_flops(rows: int, columns: int) -> float:
    """Operations of Muon's iterations for one matrix X: XXᵀ, its square, and that times X, X having more columns."""
    short, long = sorted((rows, columns))
    return MUON_ITERATIONS * 2.0 * short * short * (2 * long + short)


def gather_s(network: Network, size: float, group: Block, ranks_per_node: int) -> float:
    """Seconds in which a group of (nodes, ranks of each) gathers `size` bytes, or sums them and shares them out."""
    nodes, local = group
    card = ranks_per_node / min(network.nics, ranks_per_node)  # ranks that share it
    inside_s = size * (local - 1) / local * network.inside.byte_s + (local - 1) * network.inside.latency_s
    between_s = size / local * (nodes - 1) / nodes * network.between.byte_s * card
    return inside_s + between_s + math.ceil(math.log2(nodes)) * network.between.latency_s
