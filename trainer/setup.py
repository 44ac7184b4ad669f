"""From a `Config` to everything that a worker needs: topology, data, model, engine."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from twohop.comm import (
    AutoOptions,
    CostModel,
    PhaseClock,
    Topology,
    TrafficMeter,
    build_dispatcher,
    fit_cost_model,
)
from twohop.models import ModelConfig, MoEModel, build_model, parameter_counts
from twohop.models.build import MakeDispatcher
from twohop.models.flops import training_flops
from twohop.trainer.checkpoints.checkpoint import CheckpointStore, load_tensors
from twohop.trainer.checkpoints.state import model_tensors
from twohop.trainer.config import CommConfig, Config, DataOrder
from twohop.trainer.data import Data, Loader, build_data
from twohop.trainer.distill import Teacher, teacher_config
from twohop.trainer.engines import Engine, build_engine
from twohop.trainer.errors import ConfigError
from twohop.trainer.objective import Objective
from twohop.trainer.placement import Placement
from twohop.trainer.run_folder import CHECKPOINTS
from twohop.trainer.transforms.compiling import compile_regions
from twohop.trainer.transforms.fp8 import use_fp8_experts
from twohop.trainer.transforms.recompute import recompute_activations
from twohop.trainer.world import leader_first, rank, say, sum_over_world, time_exchanges, world_size

COSTS = "cost.json"  # the fitted cost model of comm=auto, in the run folder


@dataclass(frozen=True)
class Run:
    """A run as one rank sees it."""

    config: Config  # with model.vocab_size filled in
    directory: Path
    device: torch.device
    topology: Topology
    data: Data
    engine: Engine
    objective: Objective  # what training minimises
    checkpoints: CheckpointStore
    meter: TrafficMeter  # what this rank's MoE layers send
    clock: PhaseClock  # where this rank's time goes
    placement: Placement  # where experts live

    @property
    def model(self) -> MoEModel:
        """The model, as the engine has prepared it."""
        return self.engine.model

    @cached_property
    def flops_per_target(self) -> float | None:
        """See `training_flops`."""
        return training_flops(self.config.model, self.config.train.seq_len)

    @cached_property
    def loader(self) -> Loader:
        """This rank's training data; whoever takes steps from it closes it."""
        return Loader(self.config, self.data, self.device, rank(), world_size())

    def state(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name."""
        return self.engine.model_state() | self.engine.optimizer_state()

    def identity(self) -> dict[str, Any]:
        """What must be equal in every run that continues this one: {key: value}."""
        return {
            **model_identity(self.config),
            "seed": self.config.seed,
            "data.fingerprint": self.data.fingerprint,
            "data.order": self.config.data.order.value,
            "data.document_mask": self.config.data.document_mask,
            "train.seq_len": self.config.train.seq_len,
            "train.global_batch": self.config.train.global_batch,
        }

    def describe(self) -> str:
        """One line: the model, where it runs, and how its experts are spread."""
        total, active = parameter_counts(self.config.model)
        ep_sizes = [str(layer.dispatcher.topology.ep_size) for _, layer in self.model.moe_layers()]
        experts = f", experts by {self.config.comm.dispatcher} over EP {'/'.join(ep_sizes)}" if ep_sizes else ""
        nodes = f"{self.topology.num_nodes} nodes × {self.topology.ranks_per_node} ranks"
        return (
            f"{self.config.model.name}: {total:,} parameters, {active:,} used by a token; "
            f"{nodes} on {self.device.type}{experts}"
        )


def set_up(config: Config, directory: Path, device: torch.device) -> Run:
    """Build everything but the weights' values. Every rank of the world must call this, after `join_world`.

    Raises:
        ConfigError: the ranks fill no regular grid of nodes, or model.vocab_size is smaller than the tokenizer's.
        DataError: the data cannot be read.
    """
    train = config.train
    data = leader_first(
        lambda: build_data(config.data, train.seq_len, say, train.global_batch), config.comm.init_timeout_s
    )
    config = _sized(config, data)
    _check_images(config, data)
    _check_order(config, data)
    meter, clock = TrafficMeter(), PhaseClock(device)
    time_exchanges(clock)
    try:
        topology = Topology.discover(config.comm.ranks_per_node, timeout_s=config.comm.timeout_s)
    except ValueError as error:  # what only the started world can tell, such as nodes of different size
        raise ConfigError(str(error)) from None
    auto = _auto_options(config, topology, directory) if config.comm.dispatcher == "auto" else None

    def dispatchers(label: str, comm: CommConfig, model: ModelConfig) -> MakeDispatcher:
        ep_sizes = comm.ep_sizes(model.experts_by_layer, topology.world_size)
        return lambda layer, num_experts: build_dispatcher(
            comm.dispatcher,
            topology.with_ep(ep_sizes[layer]),
            num_experts,
            chunks=comm.chunks,
            wires=comm.wire,
            auto=auto,
            sums_at_home=comm.sums_at_home,
            label=f"{label} {layer}",
            meter=meter,
            clock=clock,
        )

    model = build_model(config.model, dispatchers("MoE layer", config.comm, config.model), device)
    for _, layer in model.moe_layers():
        layer.router.sum_over_ranks = partial(sum_over_world, what="loads of experts")
    teacher = None
    if config.distill.teacher is not None:
        taught_by = _sized(teacher_config(config), data)
        # Its experts are of another number, and so are their EP sizes: the default fits any.
        any_size = replace(config.comm, ep_size=None)
        make_dispatcher = dispatchers("the teacher's MoE layer", any_size, taught_by.model)
        teacher_model = build_model(taught_by.model, make_dispatcher, device)
        _load_teacher(teacher_model, taught_by, data, Path(config.distill.teacher).expanduser())
        teacher = Teacher(config.distill, teacher_model, student=model)
    checkpoints = CheckpointStore(directory / CHECKPOINTS, config.checkpoint.keep, say, config.checkpoint.keep_every)
    if config.engine.fp8_experts:
        use_fp8_experts(model)
    if config.train.compile:
        compile_regions(model)
    recompute_activations(model, config.train.recompute)
    engine = build_engine(model, config)
    placement = Placement(engine, config, meter)
    return Run(
        config, directory, device, topology, data, engine, Objective(teacher), checkpoints, meter, clock, placement
    )


def _load_teacher(model: MoEModel, config: Config, data: Data, directory: Path) -> None:
    """Fill this rank's share of the teacher from the newest checkpoint in its run folder."""
    checkpoint = CheckpointStore(directory / CHECKPOINTS, log=say).latest()
    if checkpoint is None:
        raise ConfigError(f"distill.teacher={directory}: holds no checkpoint; train the teacher first")
    if checkpoint.identity.get("data.fingerprint") != data.fingerprint:
        raise ConfigError(
            f"distill.teacher={directory} was trained on other data or with another tokenizer: "
            "use its data settings, or a teacher of this data"
        )
    load_tensors(checkpoint, model_tensors(model), weights_identity(config))


def _auto_options(config: Config, topology: Topology, directory: Path) -> AutoOptions:
    """What `auto` chooses by: the model of comm.cost_file, or one probed now and kept in the run folder."""
    if config.comm.cost_file is not None:
        model = CostModel.load(Path(config.comm.cost_file).expanduser())
    else:
        model = fit_cost_model(topology)
        if topology.rank == 0:
            model.save(directory / COSTS)
    vision = config.model.vision
    tokens = config.train.micro_batch * (config.train.seq_len if vision is None else vision.num_patches)
    return AutoOptions(model, tokens, between_wires=tuple(config.comm.auto_wires))


def model_identity(config: Config) -> dict[str, Any]:
    """Every key of the model's configuration as {"model.moe.every": 2, …}."""
    plain = OmegaConf.to_container(OmegaConf.structured(config.model), enum_to_str=True)
    return dict(_flat("model", plain))


def weights_identity(config: Config) -> dict[str, Any]:
    """`model_identity` without the keys that may differ where a trained model is run: how it drops tokens there."""
    free = ("eval_capacity_factor", "capacity_rounding", "min_capacity", "batch_priority")
    free_keys = {f"{side}.moe.{key}" for side in ("model", "model.encoder") for key in free}
    return {key: value for key, value in model_identity(config).items() if key not in free_keys}


def _flat(prefix: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}", inner)]


def _check_images(config: Config, data: Data) -> None:
    vision = config.model.vision
    if vision is None or data.image_shape is None:  # `validate` has seen that they belong together
        return
    channels, height, width = data.image_shape
    if data.image_shape != (vision.channels, vision.image_size, vision.image_size):
        raise ConfigError(
            f"model.vision.image_size={vision.image_size} with channels={vision.channels} does not fit the images of "
            f"data.source={config.data.source}: they are {height}×{width} with {channels} channels"
        )


def _num_tasks(config: Config, data: Data) -> int | None:
    wanted = len(data.tasks)
    size = config.model.num_tasks or wanted or None
    if size is not None and size < wanted:
        raise ConfigError(f"model.num_tasks={size} is less than the {wanted} tasks of the data: raise it, or use null")
    return size


def _check_order(config: Config, data: Data) -> None:
    if config.data.order is DataOrder.batches and len(data.train) < config.train.global_batch:
        raise ConfigError(
            f"data.order=batches: the {len(data.train)} samples of the training split make no batch of "
            f"train.global_batch={config.train.global_batch}: lower it, or use data.order=samples"
        )


def _sized(config: Config, data: Data) -> Config:
    """`config` with the sizes of the model that the data decides."""
    vocab_size, num_tasks = _vocab_size(config, data), _num_tasks(config, data)
    return replace(config, model=replace(config.model, vocab_size=vocab_size, num_tasks=num_tasks))


def _vocab_size(config: Config, data: Data) -> int:
    wanted = data.num_classes
    size = config.model.vocab_size or wanted
    if size < wanted:
        raise ConfigError(
            f"model.vocab_size={size} is smaller than the {wanted} classes of the data's targets: raise it, or use null"
        )
    return size
