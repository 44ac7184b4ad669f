"""Checks between config groups, made before any worker starts; each names key, value and cure.

What one group can know by itself is checked in its `__post_init__`.
"""

from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import torch

from twohop.comm import CostModel
from twohop.comm.placement import KINDS
from twohop.comm.routes import ROUTES
from twohop.comm.wire import FORMATS
from twohop.models.attention import build_attention
from twohop.models.config import BatchPriority, ModelConfig, ModelKind
from twohop.models.routers import ROUTERS, build_router
from twohop.trainer.config import CommConfig, Config, DataOrder, PlacementConfig, Precision, TrainConfig
from twohop.trainer.distill import teacher_config
from twohop.trainer.engines import ENGINES
from twohop.trainer.errors import ConfigError
from twohop.trainer.launching.launch import check_port, joins_outer_launcher
from twohop.trainer.optimizers.optim import OPTIMIZERS
from twohop.trainer.trackers import TRACKERS
from twohop.trainer.validate.data import check_data, check_data_fits
from twohop.trainer.validate.names import check_name, divisors


def validate(config: Config, world_size: int, training: bool = True) -> None:
    """Raise a ConfigError unless `config` can run on `world_size` ranks, on this machine if it starts them itself.

    What only training needs is asked for if `training`.
    """
    _check_comm(config.comm)
    check_name("engine.name", config.engine.name, ENGINES)
    _check_deepspeed(config)
    check_name("optim.name", config.optim.name, OPTIMIZERS)
    if training:
        _check_optimizer(config)
        _check_precision(config)
    check_name("tracker.name", config.tracker.name, TRACKERS)
    _check_router(config)
    _check_attention(config.model)
    if training:
        _check_causal(config.model)
    check_data(config.data)
    check_data_fits(config)
    _check_layout(config, world_size)
    _check_lengths(config, world_size)
    if training:
        _check_bits(config)
        _check_placement(config)
        _check_cache(config)
    if config.distill.teacher is not None:
        teacher_config(config)
    if config.eval.exit_confidence is not None and config.model.kind is not ModelKind.decoder:
        raise ConfigError(
            f"eval.exit_confidence={config.eval.exit_confidence} has no use with "
            f"model.kind={config.model.kind.value}: only the tokens of a decoder leave early; leave it out"
        )
    if not joins_outer_launcher():
        check_port(config.launch.port)


def _check_deepspeed(config: Config) -> None:
    engine, optim = config.engine, config.optim.name
    if engine.name != "deepspeed":
        return
    if find_spec("deepspeed") is None:
        raise ConfigError("engine=deepspeed: DeepSpeed is not installed; `pip install deepspeed`, or use engine=fsdp")
    if engine.zero_stage and optim != "adamw":
        raise ConfigError(
            f"optim.name={optim}: engine.zero_stage={engine.zero_stage} gives each rank flat pieces of matrices, which "
            "only an optimizer that works number by number can update: use optim.name=adamw, or engine.zero_stage=0"
        )
    if engine.zero_stage == 2 and any(side.moe.cache.enabled for side in _sides(config).values()):
        raise ConfigError(
            "engine.zero_stage=2 sums a gradient as soon as a rank has it, but a rank that follows a cached plan has "
            "none for the router: use engine.zero_stage=1, or leave out model.moe.cache.enabled"
        )


def _check_optimizer(config: Config) -> None:
    if config.optim.name == "muon" and config.engine.name == "fsdp":
        raise ConfigError(
            "optim.name=muon updates whole matrices, of which engine=fsdp leaves each rank a part: use engine=ddp, or "
            "optim=adamw"
        )


def _check_precision(config: Config) -> None:
    engine = config.engine
    if engine.precision is Precision.bf16_params and engine.name != "ddp":
        raise ConfigError(
            f"engine.precision=bf16_params: engine={engine.name} shares out fp32 weights by itself: use "
            "engine.precision=bf16, or engine=ddp"
        )


def _check_cache(config: Config) -> None:
    for side, model in _sides(config).items():
        if model.moe.cache.enabled and config.data.order is not DataOrder.batches:
            raise ConfigError(
                f"{side}.moe.cache.enabled=true: plans can only be followed again where the same micro-batches come "
                f"again, not with data.order={config.data.order.value}: add data.order=batches"
            )


def _sides(config: Config) -> dict[str, ModelConfig]:
    model = config.model
    return {"model": model} | ({"model.encoder": model.encoder_stack} if model.encoder else {})


def _check_placement(config: Config) -> None:
    placement = config.placement
    check_name("placement", placement.name, KINDS)
    moves = placement.name != "contiguous"
    fewest = min(config.model.experts_by_layer, default=0)
    reasons = {
        f"model.moe.experts={config.model.moe.experts}": placement.follows_load
        and placement.shadows >= fewest
        and (f"a layer has {fewest}: use fewer" if fewest else "there are no experts"),
        "comm.sums_at_home=true": config.comm.sums_at_home and _refuses_sums_at_home(placement),
    }
    for side, model in _sides(config).items():
        moe = model.moe
        reasons[f"{side}.moe.cache.enabled=true"] = (
            placement.follows_load and moe.cache.enabled and "its plans know where experts were: disable it"
        )
        reasons[f"{side}.moe.router.top_k=1"] = (
            placement.name == "affinity"
            and moe.router.top_k == 1
            and "tokens have one expert, and it no friends: use placement=balanced"
        )
        reasons[f"{side}.moe.router.groups={moe.router.groups}"] = (
            moves and moe.router.groups > 1 and "groups are experts of one node, which must stay together: use groups=1"
        )
    chosen = f"placement={placement.name}" if moves else f"placement.shadows={placement.shadows}"
    for key, reason in reasons.items():
        if reason:
            raise ConfigError(f"{chosen} does not go with {key}: {reason}")


def _refuses_sums_at_home(placement: PlacementConfig) -> str:
    if placement.name == "affinity":
        return "rows to friends on one node are not shared: use placement=balanced, or leave it out"
    return "what shadows compute is added last: leave it out" if placement.shadows else ""


def _check_bits(config: Config) -> None:
    for key, bits in (
        ("model.moe.expert_bits", config.model.moe.expert_bits),
        ("eval.expert_bits", config.eval.expert_bits),
    ):
        if bits is not None:
            raise ConfigError(
                f"{key}={bits}: experts of few bits have no gradients; train without, then "
                "`twohop evaluate eval.expert_bits` or `twohop export format=quantized`"
            )


def _check_comm(comm: CommConfig) -> None:
    check_name("comm.dispatcher", comm.dispatcher, [*ROUTES, "auto"])
    for direction in fields(comm.wire):
        hop = getattr(comm.wire, direction.name)
        for kind in fields(hop):
            check_name(f"comm.wire.{direction.name}.{kind.name}", getattr(hop, kind.name), FORMATS)
    for name in comm.auto_wires:
        check_name("comm.auto_wires", name, FORMATS)
    if comm.cost_file is not None:
        try:
            CostModel.load(Path(comm.cost_file).expanduser())
        except ValueError as error:
            raise ConfigError(f"comm.cost_file: {error}") from None


def _check_router(config: Config) -> None:
    model, tasks = config.model, config.data.multitask.tasks if config.data.multitask else []
    for side in (model, *([model.encoder_stack] if model.encoder else [])):
        check_name("model.moe.router.name", side.moe.router.name, ROUTERS)
        try:
            with torch.device("meta"):  # no memory: only what its constructor refuses is of interest
                for experts in set(side.experts_by_layer):
                    # The vocabulary is known once the data is there; text has one.
                    num_tasks = model.num_tasks or len(tasks) or None
                    build_router(side.moe.router, model.dim, experts, model.vocab_size or 1, num_tasks)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _check_attention(model: ModelConfig) -> None:
    try:
        with torch.device("meta"):
            build_attention(model, causal=model.kind is ModelKind.decoder)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_causal(model: ModelConfig) -> None:
    """Routes that look ahead tell a decoder what it is to predict: fine to look at, a trap to train with."""
    moe = model.moe
    router = ROUTERS[moe.router.name]
    if moe.allow_non_causal or not any(model.experts_by_block) or model.kind is ModelKind.vit:
        return
    # The sentence router of an encoder-decoder's decoder looks at the source.
    looks_ahead = "" if model.encoder is not None and moe.router.name == "sentence" else router.looks_ahead
    reasons = {f"model.moe.router.name={moe.router.name}": looks_ahead}
    if moe.drops_in_training and moe.batch_priority is not BatchPriority.none:
        reasons[f"model.moe.batch_priority={moe.batch_priority.value}"] = "tokens are ranked across the micro-batch"
    for key, reason in reasons.items():
        if reason:
            raise ConfigError(
                f"{key}: {reason}, so routes tell of later tokens, which a causal decoder is to predict, and a model "
                "trained so is worse when it writes than its loss says; keep it for evaluation, or train all the same "
                "with model.moe.allow_non_causal=true"
            )


def _check_lengths(config: Config, world_size: int) -> None:
    train, model = config.train, config.model
    if model.vision is not None and train.seq_len != TrainConfig().seq_len:
        raise ConfigError(f"train.seq_len={train.seq_len} has no use with model.kind=vit: leave it out")
    if model.vision is None and train.seq_len > model.max_seq_len:
        raise ConfigError(
            f"train.seq_len={train.seq_len} is longer than model.max_seq_len={model.max_seq_len}: "
            "lower the one or raise the other"
        )
    at_once = train.micro_batch * world_size
    if train.global_batch % at_once:
        raise ConfigError(
            f"train.global_batch={train.global_batch} is no multiple of train.micro_batch={train.micro_batch} times "
            f"{world_size} ranks: use {at_once * max(1, train.global_batch // at_once)}, or a smaller micro_batch"
        )


def _check_layout(config: Config, world_size: int) -> None:
    comm = config.comm
    if comm.ranks_per_node is not None and world_size % comm.ranks_per_node:
        raise ConfigError(
            f"comm.ranks_per_node={comm.ranks_per_node} does not divide the {world_size} ranks of this run: "
            f"use one of {divisors(world_size)}, or change launch.nproc"
        )
    experts_by_layer = config.model.experts_by_layer
    if len(comm.ep_size) not in (0, 1, len(experts_by_layer)):
        raise ConfigError(
            f"comm.ep_size={comm.ep_size} lists {len(comm.ep_size)} layers, but the model has "
            f"{len(experts_by_layer)} MoE layers: list one size for each, one for all, or use null"
        )
    for size in comm.ep_size:
        if world_size % size:
            raise ConfigError(
                f"comm.ep_size={size} does not divide the {world_size} ranks of this run: "
                f"use one of {divisors(world_size)}, or change launch.nproc"
            )
    for size, experts in zip(comm.ep_sizes(experts_by_layer, world_size), experts_by_layer, strict=True):
        if experts % size:
            raise ConfigError(
                f"{experts} experts of a layer (model.moe.experts={config.model.moe.experts}) cannot be shared evenly "
                f"by comm.ep_size={size}: use a multiple of {size} experts, or ep_size=null"
            )
