"""Fully sharded data parallelism (FSDP2): dense parameters over the world, experts over their EDP group.

A rank holds a share of every parameter and of its gradient and moments; FSDP gathers a block's parameters before they
are used and scatters the summed gradients after backward.
"""

import warnings
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from twohop.models import MoEModel
from twohop.models.moe import MoELayer
from twohop.trainer.config import Config, Precision
from twohop.trainer.engines.base import TorchEngine
from twohop.trainer.errors import ConfigError
from twohop.trainer.world import open_world_of_one, world_size


class FsdpEngine(TorchEngine):
    """See `Engine`. The collectives are FSDP's: sums, without averaging."""

    def __init__(self, model: MoEModel, config: Config) -> None:
        # The residual stream adds out of place, which is what FSDP asks of a layer that returns a view.
        warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
        open_world_of_one()
        device_type = next(model.parameters()).device.type
        self.world = init_device_mesh(device_type, (world_size(),))
        self.reshard = config.engine.reshard_after_forward
        # What autocast would convert is gathered in bf16 already; sums of gradients stay in fp32.
        low = torch.bfloat16 if config.engine.precision is Precision.bf16 else None
        self.policy = MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False
        )
        self.whole_experts: set[nn.Parameter] = set()  # of layers without replicas: nothing to share out
        for _, layer in model.moe_layers():
            self._shard_experts(layer)
        for block in model.every_block():
            self._shard(block, self.world)
        self._shard(model, self.world)
        super().__init__(model, config)

    def copies(self, name: str) -> int:
        """See `TorchEngine`: every share is held once."""
        return 1

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """See `Engine`. Gradients are summed and shared out after the last micro-batch; a rank keeps them till then."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        loss.backward()

    def reduce_gradients(self) -> None:
        """See `TorchEngine`: done by FSDP in the backward passes."""

    def _shard_experts(self, layer: MoELayer) -> None:
        """Experts over the EDP group, the layer's dense parts over the world; gathered when the layer's turn comes."""
        topology = layer.dispatcher.topology
        if topology.edp_size == 1:
            self.whole_experts |= set(layer.experts.parameters())
            return
        assert topology.mesh is not None
        # Modules that the layer calls one by one; each gathers its own parameters.
        branch = layer.residual
        for module in (layer.shared, branch and branch.mlp, branch and branch.mix):
            if module is not None:
                self._shard(module, self.world)
        # The router works in fp32 whatever the precision: near ties must not flip.
        self._shard(layer.router, self.world, replace(self.policy, param_dtype=None))
        dims = {parameter: _even_dim(parameter, topology.edp_size) for parameter in layer.experts.parameters()}
        fully_shard(
            layer,
            mesh=topology.mesh["edp"],
            reshard_after_forward=self.reshard,
            shard_placement_fn=lambda parameter: Shard(dims[parameter]),
            mp_policy=self.policy,
        )
        _sum(layer)

    def _shard(self, module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> None:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=self.reshard,
            mp_policy=policy or self.policy,
            ignored_params=self.whole_experts,
        )
        _sum(module)


def _sum(module: nn.Module) -> None:
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


def _even_dim(parameter: nn.Parameter, parts: int) -> int:
    """A dimension of a stack of experts that can be cut evenly: not the experts, of which there may be too few."""
    for dim in range(1, parameter.dim()):
        if parameter.shape[dim] % parts == 0:
            return dim
    raise ConfigError(
        f"engine=fsdp cannot share experts of shape {list(parameter.shape[1:])} among {parts} ranks: use a "
        f"model.moe.ffn_dim or model.dim that is a multiple of {parts}, or a larger comm.ep_size"
    )
