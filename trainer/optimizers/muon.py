"""Muon for the matrices between embedding and head, AdamW for all else (Jordan 2024; Liu 2025, Moonlight)."""

from typing import Any

import torch
from torch import Tensor, nn

from twohop.models import MoEModel, expert_parameters
from twohop.models.moe import ResidualBranch

MATRICES = "matrices"  # key of a parameter group: its parameters are Muon's


def hidden_matrices(model: MoEModel) -> set[str]:
    """Names of the parameters that are Muon's: linear maps inside blocks, and experts, each of which is a matrix.

    Routers, and what mixes the branches of PR-MoE, give probabilities of a few choices: they are AdamW's.
    """
    mixers = {module.mix for module in model.modules() if isinstance(module, ResidualBranch)}
    inside = {module for block in model.every_block() for module in block.modules() if isinstance(module, nn.Linear)}
    linear = {f"{name}.weight" for name, module in model.named_modules() if module in inside - mixers}
    return linear | set(expert_parameters(model))


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on parameter groups with `matrices`, torch's AdamW on the others.

    A parameter is [out, in], or a stack [E, out, in] of matrices, which are updated one by one; its state is one
    `momentum_buffer` of its own shape. Updates have the size of AdamW's (factor 0.2 · sqrt(max(out, in))), so that one
    learning rate and weight decay serve all. No rank needs another: a rank must hold whole matrices.
    """

    def __init__(self, groups: list[dict[str, Any]], adamw: torch.optim.AdamW, momentum: float) -> None:
        super().__init__(groups, {})
        self.adamw = adamw
        self.adamw.state = self.state  # one state for all, as whoever saves it expects
        self.views: dict[nn.Parameter, list[nn.Parameter]] = {}
        of_matrices = [group for group in self.param_groups if group[MATRICES]]
        for group in of_matrices:
            self.views |= {parameter: [nn.Parameter(m) for m in _matrices(parameter)] for parameter in group["params"]}
        self.muon = torch.optim.Muon(
            [
                {"params": [view], "weight_decay": group["weight_decay"]}
                for group in of_matrices
                for parameter in group["params"]
                for view in self.views[parameter]
            ],
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters, which must have gradients."""
        rates = {parameter: group["lr"] for group in self.param_groups for parameter in group["params"]}
        for group in self.adamw.param_groups:
            group["lr"] = rates[group["params"][0]]
        groups = iter(self.muon.param_groups)
        for parameter, views in self.views.items():
            assert parameter.grad is not None
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momenta = _matrices(self.state[parameter]["momentum_buffer"])
            for view, gradient, momentum in zip(views, _matrices(parameter.grad), momenta, strict=True):
                next(groups)["lr"] = rates[parameter]
                view.grad, self.muon.state[view] = gradient, {"momentum_buffer": momentum}
        self.muon.step()
        self.adamw.step()
        for views in self.views.values():
            for view in views:
                view.grad = None  # or gradients would outlive zero_grad


def _matrices(stack: Tensor) -> tuple[Tensor, ...]:
    """The matrices of a parameter, which share its memory."""
    return stack.detach().unbind(0) if stack.dim() == 3 else (stack.detach(),)
