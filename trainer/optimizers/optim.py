"""The optimizer and its parameter groups."""

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from twohop.models import MoEModel, expert_parameters
from twohop.trainer.config import OptimConfig
from twohop.trainer.errors import ConfigError
from twohop.trainer.optimizers.muon import MATRICES, MuonWithAdamW, hidden_matrices


def build_optimizer(
    model: MoEModel, config: OptimConfig, weights: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """The optimizer `config.name` over all parameters of `model`, in groups by weight decay and learning rate.

    Matrices decay; norms and biases do not. A bias of an expert is a row of a stacked [E_local, ...] tensor, so
    experts are judged by the shape of one expert. Experts have the learning rate lr · expert_lr_scale.
    Each group carries `peak_lr`, which `set_learning_rate` scales. `weights` are updated in place of the parameters of
    the same names.
    """
    if config.name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={config.name} is unknown: use one of {sorted(OPTIMIZERS)}")
    experts, matrices = expert_parameters(model), hidden_matrices(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in (weights or dict(model.named_parameters())).items():
        is_expert, is_matrix = name in experts, name in matrices
        decays = parameter.dim() - is_expert >= 2
        peak_lr = config.lr * (config.expert_lr_scale if is_expert else 1.0)
        group = groups.setdefault(
            (is_expert, decays, is_matrix, _mesh(parameter)),
            {
                "params": [],
                "peak_lr": peak_lr,
                "lr": peak_lr,
                "weight_decay": config.weight_decay if decays else 0.0,
                MATRICES: is_matrix,
            },
        )
        group["params"].append(parameter)
    return OPTIMIZERS[config.name](list(groups.values()), config)


def _mesh(parameter: torch.nn.Parameter) -> DeviceMesh | None:
    """An update of many parameters at once wants all of them on one mesh, or all whole."""
    return parameter.device_mesh if isinstance(parameter, DTensor) else None


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def materialize_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state tensors, which else exist only after a step, so that a checkpoint can fill them.

    A step with zero gradients and learning rate 0 changes no parameter; gradients that exist are dropped.
    """
    if optimizer.state:
        return
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    beta1, beta2 = config.betas
    fused, foreach = config.fused, not config.fused
    return torch.optim.AdamW(groups, betas=(beta1, beta2), eps=config.eps, fused=fused, foreach=foreach)


def _muon(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    assert config.momentum is not None
    adamw = _adamw([dict(group) for group in groups if not group[MATRICES]], config)
    return MuonWithAdamW(groups, adamw, config.momentum)


OPTIMIZERS: dict[str, Callable[[list[dict], OptimConfig], torch.optim.Optimizer]] = {"adamw": _adamw, "muon": _muon}
