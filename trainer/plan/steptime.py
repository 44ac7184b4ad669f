"""Seconds of a step: arithmetic, dispatch by the cost model of `comm=auto`, sums of gradients, optimizer.

Assumed, beside what `twohop.comm.cost` and `twohop.comm.simulate` assume: matrix products reach
`cluster.efficiency` of the peak; routing is uniform; ddp and DeepSpeed sum gradients after the last backward pass, as
they do here, and FSDP beside the arithmetic of the dense parts.
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
from twohop.trainer.config import Precision
from twohop.trainer.config.plan import PlanConfig
from twohop.trainer.plan.hardware import GPUS, network_of
from twohop.trainer.plan.memory import NUMBER, parameters_held
from twohop.trainer.plan.shape import LayerShape, ModelShape

Block = tuple[int, int]
UPDATE_BYTES = 7 * NUMBER  # AdamW reads weight, gradient and two moments of a number, and writes all but the gradient


@dataclass(frozen=True)
class Way:
    """How one layer's tokens travel, and what its dispatch, experts and combine take for one micro-batch."""

    algorithm: str
    chunks: int
    wire: str
    work: Workload
    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward_s + self.backward_s

    @property
    def experts_s(self) -> float:
        """Of both passes, if nothing were in their way."""
        return 3 * self.work.experts_s


class Timer:
    """Times of one model on one cluster."""

    def __init__(self, config: PlanConfig, shape: ModelShape, measured: CostModel | None = None) -> None:
        self.config, self.shape, self.measured = config, shape, measured
        self.gpu, self.network = GPUS[config.cluster.gpu], network_of(config.cluster)
        self.levels = (config.cluster.nodes, config.cluster.gpus_per_node)
        self.seq_len = config.seq_len or config.model.max_seq_len
        is_fp32 = config.precision is Precision.fp32
        self.peak_flops = self.gpu.fp32_flops if is_fp32 else self.gpu.bf16_flops
        self.flops = self.peak_flops * config.cluster.efficiency
        self._ways: dict[tuple[int, int, int], list[Way]] = {}
        self._models: dict[Block, CostModel] = {}

    def block(self, ep_size: int) -> Block:
        """(nodes, ranks of each) of an EP group."""
        nodes, local = ep_block(self.levels, ep_size)
        return nodes, local

    def ways(self, layer: LayerShape, ep_size: int, micro_batch: int) -> list[Way]:
        """All ways to carry a layer's tokens, the fastest first."""
        key = (layer.num_experts, ep_size, micro_batch)
        if key not in self._ways:
            block = self.block(ep_size)
            if block not in self._models:
                self._models[block] = self.measured or cost_model(self.network, block, self.levels[1])
            works = [(wire, self.workload(layer, micro_batch, wire)) for wire in self.config.wires]
            ways = [
                self._way(self._models[block], block, algorithm, chunks, wire, work)
                for algorithm in self.config.dispatchers
                for chunks in self.config.chunks
                for wire, work in works
            ]
            self._ways[key] = sorted(ways, key=lambda way: way.seconds)
        return self._ways[key]

    def workload(self, layer: LayerShape, micro_batch: int, wire: str) -> Workload:
        """Of a layer's dispatch for one micro-batch; the wire is that between nodes."""
        dim, tokens = self.shape.config.dim, micro_batch * self.seq_len
        dtype = torch.bfloat16 if self.config.precision is Precision.bf16_params else torch.float32
        return Workload(
            tokens=tokens,
            top_k=self.shape.config.moe.router.top_k,
            num_experts=layer.num_experts,
            row_bytes=dim * dtype.itemsize,
            between_row_bytes=FORMATS[wire].row_bytes(dim, dtype),
            inside_row_bytes=dim * dtype.itemsize,
            experts_s=tokens * self.shape.expert_flops(layer) / self.flops,
        )

    def _way(self, model: CostModel, block: Block, algorithm: str, chunks: int, wire: str, work: Workload) -> Way:
        axes = [("node", block[0]), ("local", block[1])]
        both = [work, replace(work, experts_s=2 * work.experts_s)]
        forward_s, backward_s = (model.predict(w, axes, algorithm, chunks) for w in both)
        return Way(algorithm, chunks, wire, work, forward_s, backward_s)

    @cached_property
    def dense_flops(self) -> float:
        """Of a token, forward and backward, without experts."""
        return self.shape.token_flops - sum(3 * self.shape.expert_flops(layer) for layer in self.shape.layers)

    def dense_s(self, micro_batch: int) -> float:
        """Arithmetic of a micro-batch, both passes, without experts."""
        return micro_batch * self.seq_len * self.dense_flops / self.flops

    def gradients_s(self, engine: str, ep_sizes: Sequence[int], micro_batch: int, accumulation: int) -> float:
        """What gradients and shared parameters add to a step."""
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
            beside = accumulation * self.dense_s(micro_batch)
            return max(0.0, 2 * accumulation * gathered + once - beside)  # for each pass of each micro-batch
        scatters = accumulation if engine == "zero2" else 1
        return (scatters + 1) * once

    def update_s(self, engine: str, ep_sizes: Sequence[int]) -> float:
        """The optimizer reads and writes all that it holds."""
        world = self.config.cluster.world
        return UPDATE_BYTES * parameters_held(self.shape, engine, ep_sizes, world) / self.gpu.memory_bytes_s


def gather_s(network: Network, size: float, group: Block, ranks_per_node: int) -> float:
    """Seconds in which a group of (nodes, ranks of each) gathers `size` bytes, or sums them and shares them out."""
    nodes, local = group
    card = ranks_per_node / min(network.nics, ranks_per_node)  # ranks that share it
    inside_s = size * (local - 1) / local * network.inside.byte_s + (local - 1) * network.inside.latency_s
    between_s = size / local * (nodes - 1) / nodes * network.between.byte_s * card
    return inside_s + between_s + math.ceil(math.log2(nodes)) * network.between.latency_s
