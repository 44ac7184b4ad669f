"""Model and optimizer as named tensors, the form in which checkpoints hold them.

A parameter of experts, of which every rank has a share, becomes one DTensor [E, ...] here and only here: that is
what lets a checkpoint be read by any other number of ranks or EP size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from twohop.comm import Topology
from twohop.comm.move import move_rows
from twohop.models import MoEModel, expert_parameters
from twohop.models.moe import MoELayer
from twohop.trainer.optimizers.optim import materialize_state
from twohop.trainer.world import exchanging


def model_tensors(model: MoEModel, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All parameters and persistent buffers as "model.NAME"; buffers, such as a router's bias, are equal on all ranks.

    An expert parameter is one DTensor [E, ...] over its layer's ("edp", "ep") mesh. The tensors share memory with the
    model, or with `weights`, which stand for its parameters of the same names; those of experts that moved do not.
    """
    experts = expert_parameters(model)
    replaced = {name: weight.detach() for name, weight in (weights or {}).items()}
    return {
        f"model.{name}": _whole(tensor, experts.get(name)) for name, tensor in (model.state_dict() | replaced).items()
    }


def optimizer_tensors(
    model: MoEModel, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The state of every parameter as "optim.NAME.KEY", moments of experts sharded as the experts are.

    `weights` are what is optimised in place of the parameters of the same names.
    """
    materialize_state(optimizer)
    experts = expert_parameters(model)
    tensors = {}
    for name, parameter in (weights or dict(model.named_parameters())).items():
        for key, value in optimizer.state[parameter].items():
            sharded = name in experts and value.shape == parameter.shape  # the step count is a scalar
            tensors[f"optim.{name}.{key}"] = _whole(value, experts[name] if sharded else None)
    return tensors


def _whole(local: Tensor, layer: MoELayer | None) -> Tensor:
    """A layer's experts, in the order of their numbers wherever they live, as part of all; anything else as it is.

    Of experts that have moved (`MoELayer.slots_E`) this is a copy, and every rank of the EP group must call it.
    """
    return local if layer is None else global_tensor(in_order(local, layer), layer.dispatcher.topology)


def in_order(local: Tensor, layer: MoELayer) -> Tensor:
    """A rank's rows of experts, in the order of their numbers. If they have moved, a copy, and collective as above."""
    if layer.slots_E is None:
        return local
    slots_E = layer.slots_E.cpu()
    with exchanging("experts in the order of their numbers"):
        return move_rows(local.detach(), slots_E, torch.arange(len(slots_E)), layer.dispatcher.topology)


def global_tensor(local: Tensor, topology: Topology | None) -> Tensor:
    """A rank's experts, or its share of them along another dimension, as part of all; anything else as it is."""
    if topology is None or topology.mesh is None:
        return local
    replicas: Placement = Replicate()
    if isinstance(local, DTensor):  # shared out among the EDP group, along another dimension than the experts
        (replicas,), local = local.placements, local.to_local()
    return DTensor.from_local(local, topology.mesh, [replicas, Shard(0)], run_check=False)
