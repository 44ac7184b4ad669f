"""What engines of torch optimizers share: accumulate, sum over ranks, clip, update."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from twohop.models import MoEModel, expert_parameters
from twohop.models.moe import MoELayer
from twohop.trainer.checkpoints.state import model_tensors, optimizer_tensors
from twohop.trainer.config import Config, Precision
from twohop.trainer.engines.masters import MasterWeights
from twohop.trainer.optimizers.optim import build_optimizer, set_learning_rate
from twohop.trainer.world import sum_over_world, world_size

NORM_NUMBERS = 4 << 20  # of a gradient that are looked at together: a copy of 32 MiB


class TorchEngine:
    """See `Engine`. A subclass says how gradients are summed and how many ranks hold a copy of a parameter's share."""

    def __init__(self, model: MoEModel, config: Config) -> None:
        self.model = model
        self.precision = config.engine.precision
        self.masters = MasterWeights(model) if self.precision is Precision.bf16_params else None
        # What the optimizer updates.
        self.weights = dict(model.named_parameters()) if self.masters is None else self.masters.by_name
        self.optimizer = build_optimizer(model, config.optim, self.weights)
        self.clip_norm = config.optim.clip_norm
        self.expert_layers = expert_parameters(model)

    def reduce_gradients(self) -> None:
        """Sum every parameter's gradient, which exists, over the ranks that hold it."""
        raise NotImplementedError

    def copies(self, name: str) -> int:
        """How many ranks hold what this rank holds of a parameter."""
        raise NotImplementedError

    def autocast(self) -> AbstractContextManager:
        """See `Engine`. `bf16` is autocast over fp32 parameters; `bf16_params` needs none."""
        if self.masters is not None:
            self.masters.split()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision is Precision.bf16)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        loss.backward()

    def step(self, lr_factor: float) -> float:
        """See `Engine`.

        A parameter without a gradient (experts that got no token here) counts as zeros: every rank then takes part
        in the same collectives, and the optimizer treats it alike everywhere.
        """
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.reduce_gradients()
        if self.masters is not None:
            self.masters.take_gradients()
        norm = self._gradient_norm()
        if math.isfinite(norm):
            self._clip(norm)
            set_learning_rate(self.optimizer, lr_factor)
            self.optimizer.step()
            if self.masters is not None:
                self.masters.publish()
        self.optimizer.zero_grad()
        return norm

    def model_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return model_tensors(self.model, self.weights)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return optimizer_tensors(self.model, self.optimizer, self.weights)

    def restored(self, state: dict[str, Tensor]) -> None:
        """See `Engine`: loading has written into the weights and the optimizer themselves."""
        if self.masters is not None:
            self.masters.publish()

    @torch.no_grad()
    def move_experts(self, layer: MoELayer, move: Callable[[Tensor], Tensor]) -> None:
        """See `Engine`."""
        for weight in (self.weights[name] for name, owner in self.expert_layers.items() if owner is layer):
            for tensor in (weight, *self.optimizer.state.get(weight, {}).values()):
                if tensor.shape == weight.shape:  # the count of steps is no row of experts
                    tensor.copy_(move(tensor))
        if self.masters is not None:
            self.masters.publish()

    def gradients(self) -> Iterator[tuple[Tensor, int]]:
        """This rank's shares of the summed gradients, each with the number of ranks that hold it."""
        for name, weight in self.weights.items():
            assert weight.grad is not None
            yield _local(weight.grad), self.copies(name)

    def _gradient_norm(self) -> float:
        """Norm of the whole model's gradient: every number counts once, wherever it lies.

        A share's square is divided by the number of its copies and summed over the world, in one all-reduce; what all
        ranks hold is not sent. All in fp64, so that the norm does not depend on how the parameters are spread.
        """
        device = next(self.model.parameters()).device
        everywhere, shares = torch.zeros(2, dtype=torch.float64, device=device)
        for gradient, copies in self.gradients():
            square = _square(gradient)
            if copies == world_size():
                everywhere = everywhere + square
            else:
                shares = shares + square / copies
        sum_over_world(shares, "gradient norm")
        return float((everywhere + shares).sqrt())

    def _clip(self, norm: float) -> None:
        # As torch.nn.utils.clip_grads_with_norm_, which knows no parameters on different meshes.
        if self.clip_norm is not None:
            factor = min(1.0, self.clip_norm / (norm + 1e-6))
            torch._foreach_mul_([gradient for gradient, _ in self.gradients()], factor)


def _square(gradient: Tensor) -> Tensor:
    """The sum of squares in fp64, of one piece after the other: torch makes an fp64 copy."""
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in gradient.reshape(-1).split(NORM_NUMBERS)]
    return torch.stack(norms).square().sum()


def _local(tensor: Tensor) -> Tensor:
    """This rank's share of a gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
