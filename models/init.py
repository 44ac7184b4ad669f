"""Initial weights that depend on the seed and on a parameter's name, not on how the model is spread over ranks."""

import hashlib
import math

import torch
from torch import Tensor, nn

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
            first_expert = experts[name].dispatcher.first_expert
            for i, matrix in enumerate(parameter):
                _fill_normal(matrix, std, f"{seed}/{name}/{first_expert + i}")
        else:
            _fill_normal(parameter, std, f"{seed}/{name}")
    for name, layer in model.moe_layers():
        layer.router.init_buffers(_generator(f"{seed}/{name}.router"))
        layer.capacity.init_buffers()


def _fill_normal(parameter: Tensor, std: float, key: str) -> None:
    """Draws on the CPU in fp32, so that device and dtype do not change the weights beyond rounding."""
    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=_generator(key)))


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
