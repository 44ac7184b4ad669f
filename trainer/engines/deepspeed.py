"""ZeRO-0, 1 and 2 (Rajbhandari 2020) by DeepSpeed, for our MoE layers.

DeepSpeed sums gradients, holds a partition of the optimizer's state on each rank, updates it and gathers the weights.
Ours are the process groups, the gradient norm and the clipping. Only this module imports DeepSpeed.

Words: a *fragment* is the part of a flattened parameter, from anywhere to anywhere, that a rank updates under ZeRO-1/2;
a *share* is an even cut of a parameter's state along one dimension, the form in which checkpoints hold it.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import deepspeed.comm.comm
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups, safe_get_full_optimizer_state, safe_set_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from twohop.comm import Topology
from twohop.models import MoEModel
from twohop.models.moe import MoELayer
from twohop.trainer.checkpoints.state import global_tensor, in_order
from twohop.trainer.config import Config
from twohop.trainer.engines.base import TorchEngine
from twohop.trainer.engines.deepspeed_config import deepspeed_config
from twohop.trainer.optimizers.optim import materialize_state, set_learning_rate
from twohop.trainer.world import exchanging, open_world_of_one, world_size


class DeepSpeedEngine(TorchEngine):
    """See `Engine`.

    Under ZeRO-1 and 2 the parameters become views of flat buffers, whose order is DeepSpeed's, and
    `optimizer_state` is a copy: the fragments of all ranks, gathered and cut anew into shares.
    """

    def __init__(self, model: MoEModel, config: Config) -> None:
        super().__init__(model, config)
        self.stage = config.engine.zero_stage
        with _with_local_rank():
            _join_world()
            _share_groups(model)
            self.optimizer.param_groups[:] = _split_by_replicas(self.optimizer.param_groups)
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=nn.ModuleList([model, *(_Visible(layer) for _, layer in model.moe_layers())]),
                optimizer=self.optimizer,
                config=deepspeed_config(config, world_size()),
                dist_init_required=False,
            )
        device_type = next(model.parameters()).device.type
        self.world = init_device_mesh(device_type, (world_size(),)) if self.stage else None

    def copies(self, name: str) -> int:
        """See `TorchEngine`; without ZeRO."""
        return self.expert_layers[name].dispatcher.topology.edp_size if name in self.expert_layers else world_size()

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`. ZeRO-0 and 1 sum gradients after the last micro-batch, ZeRO-2 after each."""
        self.engine.set_gradient_accumulation_boundary(last)
        if self.stage == 1 and last:
            # DeepSpeed leaves out a gradient that does not exist, and ranks would send buckets of different content.
            for parameter in self.model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> float:
        """See `Engine`."""
        norm = self._gradient_norm()
        if math.isfinite(norm):
            self._clip(norm)
            set_learning_rate(self.optimizer, lr_factor)
            if self.stage:
                self.zero.refresh_fp32_params()  # whoever filled the parameters knows nothing of DeepSpeed's copy
            self.engine.step()
        else:
            self._drop_gradients()
        return norm

    def gradients(self) -> Iterator[tuple[Tensor, int]]:
        """See `TorchEngine`. Under ZeRO-1 and 2 a rank has its fragments of the sums, and nobody else has them."""
        if not self.stage:
            yield from super().gradients()
            return
        for pieces in self.zero.averaged_gradients.values():
            yield from ((piece, 1) for piece in pieces)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine`. Under ZeRO-1 and 2 a copy; every rank must call it. It is as large as the rank's partition."""
        if not self.stage:
            return super().optimizer_state()
        tensors = {}
        for name, parameter, state, flat in self._states():
            for key, value in state.items():
                if value.shape == flat.shape:
                    value = self._share(name, safe_get_full_optimizer_state(parameter, key))
                tensors[f"optim.{name}.{key}"] = value
        return tensors

    def restored(self, state: dict[str, Tensor]) -> None:
        """See `Engine`."""
        if not self.stage:
            return super().restored(state)
        for name, parameter, own, flat in self._states():
            for key, value in own.items():
                if value.shape == flat.shape:  # others, such as the count of steps, are no copies
                    with exchanging("optimizer state"):
                        whole = _whole(state[f"optim.{name}.{key}"])
                    safe_set_full_optimizer_state(parameter, whole, key)

    @torch.no_grad()
    def move_experts(self, layer: MoELayer, move: Callable[[Tensor], Tensor]) -> None:
        """See `Engine`. A fragment is no row, so the state of all experts of the rank is put together and cut anew."""
        if not self.stage:
            return super().move_experts(layer, move)
        for name, parameter, state, flat in self._states():
            if self.expert_layers.get(name) is layer:
                parameter.copy_(move(parameter))
                for key in (key for key, value in state.items() if value.shape == flat.shape):
                    whole = move(safe_get_full_optimizer_state(parameter, key))
                    safe_set_full_optimizer_state(parameter, whole, key)

    def _states(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor], Tensor]]:
        """(name, parameter, optimizer's state of its partition, the partition), in one order on all ranks."""
        materialize_state(self.optimizer)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        partitions = self.zero.single_partition_of_fp32_groups
        for parameters, flat in zip(self.zero.bit16_groups, partitions, strict=True):
            # DeepSpeed links a parameter to its state after the first update, but only those of the first group.
            lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)
            yield from ((names[parameter], parameter, self.optimizer.state[flat], flat) for parameter in parameters)

    def _share(self, name: str, whole: Tensor) -> Tensor:
        """This rank's share of what its replicas have in common, as part of the global tensor."""
        if name not in self.expert_layers:
            return _cut(whole, self.world, first_dim=0)
        layer = self.expert_layers[name]
        topology = layer.dispatcher.topology
        replicas = topology.mesh["edp"] if topology.mesh is not None else None
        return global_tensor(_cut(in_order(whole, layer), replicas, first_dim=1), topology)

    def _drop_gradients(self) -> None:
        if not self.stage:
            self.engine.zero_grad()
            return
        self.zero.zero_grad()
        for number in self.zero.averaged_gradients:
            self.zero.averaged_gradients[number] = self.zero.all_grad_tensors[number] = None


class _Visible(MoE):
    """Tells DeepSpeed that there is an MoE layer, which it knows by this class alone; holds nothing."""

    def __init__(self, layer: MoELayer) -> None:
        nn.Module.__init__(self)
        topology = layer.dispatcher.topology
        self.num_experts = layer.dispatcher.num_experts
        self.num_local_experts = layer.dispatcher.num_local_experts
        self.ep_size = topology.ep_size
        self.expert_group_name = _group_name(topology)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed to make process groups: they exist."""


def _group_name(topology: Topology) -> str:
    return f"ep_size_{topology.ep_size}"


class _Backend(TorchBackend):
    """DeepSpeed's exchanges as ours: an error says what was exchanged, and the time counts as communication."""

    def all_reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Sums of gradients, and fragments put together."""
        with exchanging("DeepSpeed's sums"):
            return super().all_reduce(*args, **kwargs)

    def all_gather_into_tensor(self, *args: Any, **kwargs: Any) -> Any:
        """Updated weights."""
        with exchanging("updated weights"):
            return super().all_gather_into_tensor(*args, **kwargs)


@contextmanager
def _with_local_rank() -> Iterator[None]:
    """DeepSpeed reads LOCAL_RANK, which a process without a launcher does not have."""
    missing = "LOCAL_RANK" not in os.environ
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield
    finally:
        if missing:
            del os.environ["LOCAL_RANK"]


def _join_world() -> None:
    """Let DeepSpeed use the world that there is."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor. is deprecated", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
    open_world_of_one()
    deepspeed.comm.comm.cdb = _Backend(dist.get_backend(), timeout=None, init_method=None)


def _share_groups(model: MoEModel) -> None:
    """Give DeepSpeed our process groups and mark the parameters of experts with theirs.

    Groups of its own would have no deadline, and would take neighbouring ranks where ours follow the nodes.
    """
    groups._release_process_group_references()  # of an engine before this one
    groups._WORLD_GROUP = dist.group.WORLD
    for _, layer in model.moe_layers():
        topology = layer.dispatcher.topology
        name = _group_name(topology)
        groups._EXPERT_PARALLEL_GROUP[name] = topology.ep_group or dist.group.WORLD
        groups._EXPERT_DATA_PARALLEL_GROUP[name] = topology.edp_group or dist.group.WORLD
        for parameter in layer.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]


def _split_by_replicas(param_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of the optimizer in which all parameters have their replicas on the same ranks.

    DeepSpeed's own function for this goes through a set, whose order differs from rank to rank: with two EP sizes in a
    model, ranks would add up different experts.
    """
    split: dict[tuple, dict[str, Any]] = {}
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            replicas = getattr(parameter, "group_name", None)
            described: dict[str, Any] = {"params": [], "name": replicas or "dense", "moe": replicas is not None}
            split.setdefault((number, replicas), group | described)["params"].append(parameter)
    return list(split.values())


def _cut(whole: Tensor, mesh: DeviceMesh | None, first_dim: int) -> Tensor:
    """This rank's even part of what all ranks of `mesh` have, along the first dimension that allows it, else all."""
    if mesh is None or mesh.size() == 1:
        return whole
    for dim in range(first_dim, whole.dim()):
        if whole.shape[dim] % mesh.size() == 0:
            part = whole.chunk(mesh.size(), dim)[mesh.get_local_rank()].clone()  # lets go of the rest
            return DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)


def _whole(tensor: Tensor) -> Tensor:
    """The inverse of `DeepSpeedEngine._share`: of experts those that live here, of anything else all. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.device_mesh.ndim == 2:
        replicas = tensor.device_mesh["edp"]
        tensor = DTensor.from_local(tensor.to_local(), replicas, tensor.placements[:1], run_check=False)
    return tensor.full_tensor()
