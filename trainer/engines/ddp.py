"""Replicated dense parameters, experts spread over their EP group: the plain engine."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from twohop.models import MoEModel
from twohop.trainer.config import Config
from twohop.trainer.engines.base import TorchEngine
from twohop.trainer.world import exchanging, world_size

BUCKET_BYTES = 32 << 20  # enough to hide the latency of a message, small beside the model


class DdpEngine(TorchEngine):
    """See `Engine`. Dense gradients are summed over the world, each layer's experts over that layer's EDP group."""

    def __init__(self, model: MoEModel, config: Config) -> None:
        super().__init__(model, config)
        self.buckets = self._make_buckets()

    def copies(self, name: str) -> int:
        """See `TorchEngine`."""
        return self.expert_layers[name].dispatcher.topology.edp_size if name in self.expert_layers else world_size()

    def reduce_gradients(self) -> None:
        """Sum every bucket over its group, once a step; the gradients become views into the buckets.

        At once, so that no more than one bucket is there twice.
        """
        pending = []
        with exchanging("gradients"):
            for group, parameters in self.buckets:
                flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
                pending.append(dist.all_reduce(flat, group=group, async_op=True))
                for parameter, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                    parameter.grad = piece.view_as(parameter)
            for work in pending:
                work.wait()

    def _make_buckets(self) -> list[tuple[Any, list[nn.Parameter]]]:
        """(process group, parameters whose gradients travel together), in one order on all ranks."""
        buckets: list[tuple[Any, list[nn.Parameter]]] = []
        fill: dict[tuple, int] = {}  # (group, dtype, has a master) -> index of the bucket that is being filled
        for name, parameter in self.model.named_parameters():
            group = self._reduction_group(name)
            if group is None:  # no replicas
                continue
            key = (group, parameter.dtype, self.masters is not None and parameter in self.masters.pairs)
            bucket = buckets[fill[key]][1] if key in fill else []
            if not bucket or sum(p.nbytes for p in bucket) + parameter.nbytes > BUCKET_BYTES:
                bucket = []
                fill[key] = len(buckets)
                buckets.append((group, bucket))
            bucket.append(parameter)
        return buckets

    def _reduction_group(self, name: str) -> Any:
        if name not in self.expert_layers:
            return dist.group.WORLD if world_size() > 1 else None
        topology = self.expert_layers[name].dispatcher.topology
        return topology.edp_group if topology.edp_size > 1 else None
