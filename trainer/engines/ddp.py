"""Replicated dense parameters, experts spread over their EP group: the plain engine."""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twohop.models import MoEModel, expert_parameters
from twohop.trainer.config import Config, Precision
from twohop.trainer.optim import build_optimizer, set_learning_rate
from twohop.trainer.state import model_tensors, optimizer_tensors
from twohop.trainer.world import exchanging, sum_over_world, world_size

BUCKET_BYTES = 32 << 20  # enough to hide the latency of a message, small beside the model


class DdpEngine:
    """See `Engine`. Dense gradients are summed over the world, each layer's experts over that layer's EDP group."""

    def __init__(self, model: MoEModel, config: Config) -> None:
        self.model = model
        self.optimizer = build_optimizer(model, config.optim)
        self.clip_norm = config.optim.clip_norm
        self.precision = config.engine.precision
        self.expert_layers = expert_parameters(model)
        self.buckets = self._make_buckets()

    def autocast(self) -> AbstractContextManager:
        """See `Engine`. `bf16` is autocast over fp32 parameters."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is Precision.bf16)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`. No communication but that of the MoE layers: gradients travel once a step."""
        loss.backward()

    def step(self, lr_factor: float) -> float:
        """See `Engine`."""
        self._reduce_gradients()
        norm = self._gradient_norm()
        if math.isfinite(norm):
            if self.clip_norm is not None:
                total_norm = torch.tensor(norm, dtype=torch.float64)
                nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, total_norm)
            set_learning_rate(self.optimizer, lr_factor)
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def model_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return model_tensors(self.model)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return optimizer_tensors(self.model, self.optimizer)

    def _make_buckets(self) -> list[tuple[Any, list[nn.Parameter]]]:
        """(process group, parameters whose gradients travel together), in one order on all ranks."""
        buckets: list[tuple[Any, list[nn.Parameter]]] = []
        fill: dict[tuple, int] = {}  # (group, dtype) -> index of the bucket that is being filled
        for name, parameter in self.model.named_parameters():
            group = self._reduction_group(name)
            if group is None:  # no replicas
                continue
            key = (group, parameter.dtype)
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

    def _reduce_gradients(self) -> None:
        """Sum every bucket over its group; the gradients become views into the buckets.

        A parameter without a gradient (experts that got no token here) counts as zeros: every rank then takes part
        in the same collectives, and the optimizer treats it alike everywhere.
        """
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        pending = []
        with exchanging("gradients"):
            for group, parameters in self.buckets:
                flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
                pending.append((dist.all_reduce(flat, group=group, async_op=True), flat, parameters))
            for work, _, _ in pending:
                work.wait()
        for _, flat, parameters in pending:
            pieces = flat.split([p.numel() for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def _gradient_norm(self) -> float:
        """Norm of the whole model's gradient: every expert shard counts once, whatever its layer's EP size.

        A shard's square is divided by the number of its replicas and summed over the world, in one all-reduce. All
        in fp64, so that the norm does not depend on how the parameters are spread.
        """
        device = next(self.model.parameters()).device
        dense, experts = torch.zeros(2, dtype=torch.float64, device=device)
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float64).square()
            if name in self.expert_layers:
                experts = experts + square / self.expert_layers[name].dispatcher.topology.edp_size
            else:
                dense = dense + square
        sum_over_world(experts, "gradient norm")
        return float((dense + experts).sqrt())
