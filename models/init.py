"""Initial weights that depend on the seed and on a parameter's name, not on how the model is spread over ranks."""

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from twohop.models.base import MoEModel
from twohop.models.build import expert_parameters


@torch.no_grad()
def init_weights(model: MoEModel, seed: int) -> None:
    """Normal weights of standard deviation `init_std`; norms 1, biases and attention spans 0.

    The matrices that write into the residual stream start smaller by sqrt(2 · layers) (Radford 2019, GPT-2). Each
    parameter has a generator of its own, keyed by (seed, name), and each expert one by (seed, name, global expert
    index): so weights are equal for every EP size, and an expert more or less leaves the others as they were.
    """
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.RMSNorm)}
    experts = expert_parameters(model)
    residual_scale = 1 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        writes_to_residual = name.removesuffix(".weight").endswith((".wo", ".down"))
        std = model.config.init_std * (residual_scale if writes_to_residual else 1.0)
        if name in norms:
            parameter.fill_(1.0)
        elif name.endswith((".bias", ".attention.span")):  # a span of 0 positions is where learning starts
            parameter.zero_()
        elif name in experts:
            first = experts[name].dispatcher.first_expert
            keys = [f"{seed}/{name}/{expert}" for expert in range(first, first + len(parameter))]
            assign(parameter, torch.stack([_normal(parameter.shape[1:], std, key) for key in keys]))
        else:
            assign(parameter, _normal(parameter.shape, std, f"{seed}/{name}"))
    for name, layer in model.moe_layers():
        layer.router.init_buffers(_generator(f"{seed}/{name}.router"))
        layer.capacity.init_buffers()


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter to `value`, or this rank's share of one that is a DTensor. No communication."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        shared = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter, value = parameter.to_local(), shared.to_local()
    parameter.copy_(value)


def _normal(shape: torch.Size, std: float, key: str) -> Tensor:
    """Drawn on the CPU in fp32, so that device and dtype do not change the weights beyond rounding."""
    return torch.empty(shape).normal_(0.0, std, generator=_generator(key))


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
