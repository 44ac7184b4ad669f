"""What a model keeps of a forward pass for its backward pass, counted by running it on tensors without memory.

The model's own code runs, so that whatever it comes to keep is counted. Only the dispatcher is a stand-in: a rank gets
as many rows as it sends, as with uniform routing, and one expert takes them all, which keeps as much as many.

Shapes: N tokens, K experts of a token, D model width, R rows at the experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable

from twohop.comm import TokenDispatcher, Topology
from twohop.models import ModelConfig, grouped
from twohop.models.build import MODELS


class StandIn(TokenDispatcher):
    """Carries no rows, but gives the experts as many as it gets: R = N·K, or fewer where a capacity drops some."""

    def __init__(self, num_experts: int, rows: Callable[[int], int]) -> None:
        self.topology, self.num_experts, self.rows = Topology.one_process(), num_experts, rows

    @property
    def num_local_experts(self) -> int:
        """The one that takes all rows."""
        return 1

    def plan(self, tokens_ND: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor, counts_on_device: bool = False) -> Any:
        """How many rows come."""
        return self.rows(expert_ids_NK.numel()), weights_NK

    def follow(
        self, planned: Any, tokens_ND: Tensor, experts: Callable, beside: Callable[[], Any] | None = None
    ) -> tuple[Tensor, Any]:
        """Keeps what `twohop.comm.pipeline` keeps: the experts' results and the combine weights."""
        (rows, weights_NK), output = planned, None
        if beside is not None:
            output = beside()
        rows_RD = _Copy.apply(tokens_ND, rows)
        return _WeighAndSum.apply(experts(rows_RD, [rows]), weights_NK, len(tokens_ND)), output


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, rows: int) -> Tensor:
        return tokens_ND.new_empty(rows, tokens_ND.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError


class _WeighAndSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_NK: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_NK.reshape(-1)[: len(rows_RD)])
        return rows_RD.new_empty(tokens, rows_RD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        raise NotImplementedError


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[list[int]]:
    """Adds up, in the one number of the list, the storages that autograd saves inside, without parameters."""
    seen = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    total = [0]
    alive = []  # so that no storage is freed and its place counted as seen

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def activation_bytes(config: ModelConfig, seq_len: int, micro_batch: int, bf16: bool) -> int:
    """Bytes that a rank keeps of a micro-batch of `micro_batch` sequences, logits and loss included."""
    dispatchers = _stand_ins(config)
    # fp32 `grouped_mm` is not defined for such tensors; matrix by matrix, as much is kept.
    with FakeTensorMode(), patch.object(grouped, "_grouped_mm_is_defined", lambda *_: False):
        model = MODELS[config.kind](config, dispatchers)
        ids_BT = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
        with kept_bytes(model) as total, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(ids_BT)
            nn.functional.cross_entropy(output.logits.flatten(0, 1).float(), ids_BT.flatten())
    return total[0]


def _stand_ins(config: ModelConfig) -> list[StandIn]:
    factor = config.moe.capacity_factor

    def rows(assignments: int) -> int:
        return int(assignments * min(1.0, factor)) if factor else assignments

    return [StandIn(experts, rows) for experts in config.experts_by_layer]
