"""bf16 parameters that are trained through fp32 masters (Micikevicius 2018, Mixed Precision Training)."""

import torch
from torch import nn

from twohop.models import MoEModel


class MasterWeights:
    """The fp32 weights behind a model whose parameters, all but the routers', are bf16.

    Masters are what the optimizer updates and a checkpoint holds: updates smaller than bf16's 8 bits add up in them,
    and a resumed run has the same bits. Until the first pass through the model, parameters and masters are the same
    memory, so whoever fills the model with its first weights need not know of them.
    """

    def __init__(self, model: MoEModel) -> None:
        routers = {parameter for _, layer in model.moe_layers() for parameter in layer.router.parameters()}
        self.by_name = {
            name: parameter if parameter in routers else nn.Parameter(parameter.detach())
            for name, parameter in model.named_parameters()
        }
        pairs = [(parameter, self.by_name[name]) for name, parameter in model.named_parameters()]
        self.pairs = {parameter: master for parameter, master in pairs if parameter is not master}
        self.is_split = False

    def split(self) -> None:
        """Before a pass through the model: from now on its parameters are bf16, rounded from the masters."""
        if not self.is_split:
            for parameter, master in self.pairs.items():
                parameter.data = master.detach().bfloat16()
            self.is_split = True

    @torch.no_grad()
    def publish(self) -> None:
        """Round changed masters into the model."""
        torch._foreach_copy_(list(self.pairs), list(self.pairs.values()))

    def take_gradients(self) -> None:
        """Move the model's gradients to the masters, as fp32."""
        for parameter, master in self.pairs.items():
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
