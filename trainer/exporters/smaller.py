"""`format=pruned` and `format=quantized`: a run folder whose model is smaller, for `twohop evaluate` and `generate`.

Shapes: E experts of a layer.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from twohop.models.compress import check_gate, compress, gate_weights
from twohop.models.config import ModelConfig
from twohop.models.quantize import quantize_experts
from twohop.trainer.checkpoints.checkpoint import CheckpointStore, together
from twohop.trainer.checkpoints.state import model_tensors
from twohop.trainer.config import Config, ExportConfig
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.evaluate import validation_batches
from twohop.trainer.run_folder import CHECKPOINTS, write_config
from twohop.trainer.setup import Run
from twohop.trainer.world import say, sum_over_world


def export_pruned(run: Run, config: ExportConfig) -> dict[str, Any]:
    """Fewer experts in each layer: those with the highest use × gate weight on the validation split.

    With `merge` the others are averaged into the kept ones. Every rank must call this; each holds one layer's experts
    after the other, and all of those that stay.

    Raises:
        ConfigError: a layer cannot have that many experts, or has a router that cannot do with fewer.
        CheckpointError: the folder holds something already, or cannot be written.
    """
    layers = list(run.model.moe_layers())
    keep = _kept(config, run.config.model)
    for name, layer in layers:
        _or_config_error(partial(check_gate, name, layer))
    model = _or_config_error(lambda: _smaller(run.config.model, keep))
    scores = _scores(run)
    tensors = model_tensors(run.model)
    for (name, _), count in zip(layers, keep, strict=True):
        prefix = f"model.{name}."
        names = [full for full in tensors if full.startswith(prefix)]
        whole = {full.removeprefix(prefix): _whole(tensors[full]) for full in names}
        made = compress(whole, scores[name], count, config.merge)
        tensors |= {prefix + part: tensor for part, tensor in made.items()}
    return _write_run(run, config, model, tensors)


def export_quantized(run: Run, config: ExportConfig) -> dict[str, Any]:
    """The same experts with weights of `bits` bits. Every rank must call this.

    Raises:
        ConfigError: the experts have widths that 4 bits do not fit, or few bits already.
        CheckpointError: the folder holds something already, or cannot be written.
    """
    _or_config_error(lambda: quantize_experts(run.model, config.bits))
    model = replace(run.config.model, moe=replace(run.config.model.moe, expert_bits=config.bits))
    return _write_run(run, config, model, model_tensors(run.model))


def _kept(config: ExportConfig, model: ModelConfig) -> list[int]:
    """How many experts stay in each MoE layer."""
    now, keep = model.experts_by_layer, config.experts
    if model.encoder is not None:
        raise ConfigError(f"format=pruned has no use with model.kind={model.kind.value}: only one stack can be pruned")
    if len(keep) == 1:
        keep = keep * len(now)
    if len(keep) != len(now) or not all(1 <= count <= there for count, there in zip(keep, now, strict=True)):
        raise ConfigError(f"experts={config.experts}: the layers have {now}; say for each how many of them stay")
    return keep


def _smaller(model: ModelConfig, keep: list[int]) -> ModelConfig:
    """The configuration with `keep` experts in its MoE layers; a dense block in the place of one stays dense."""
    counts = iter(keep)
    places = model.moe.experts if len(model.moe.experts) > 1 else keep
    return replace(model, moe=replace(model.moe, experts=[there and next(counts) for there in places]))


@torch.no_grad()
def _scores(run: Run) -> dict[str, Tensor]:
    """Use × mean gate weight of every expert over the evaluated samples of the validation split: {layer: fp64 [E]}."""
    run.model.eval()
    totals: dict[str, Tensor] = {}
    for batch, counts in validation_batches(run):
        with gate_weights(run.model) as sums, run.engine.autocast():
            run.model(**batch.inputs)
        for name, sum_E in sums.items():
            totals[name] = totals.get(name, torch.zeros_like(sum_E)) + sum_E * counts
    for name, total_E in totals.items():
        sum_over_world(total_E, f"gate weights of {name}")
    return totals


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_run(run: Run, config: ExportConfig, model: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A run folder with config.yaml and one checkpoint, of the step that the exported one has."""
    assert config.out is not None
    out = Path(config.out).expanduser()
    stored = {field.name: getattr(run.config, field.name) for field in fields(Config)}
    smaller = Config(**stored | {"model": model, "run": replace(config.run, dir=str(out)), "resume": None})
    smaller.comm = replace(smaller.comm, ep_size=None)  # the old sizes need not divide the new numbers of experts

    def make_folder() -> None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise CheckpointError(f"out={out} holds something already: choose another folder, or delete it")
        out.mkdir(parents=True, exist_ok=True)
        write_config(out, smaller)

    together(make_folder, only_rank_0=True)
    checkpoint = run.checkpoints.latest()
    assert checkpoint is not None
    identity = replace(run, config=smaller).identity()
    CheckpointStore(out / CHECKPOINTS, log=say).save(checkpoint.step, tensors, identity, checkpoint.tracker_id)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    say(f"{out}: {size:,} bytes of weights; twohop evaluate run={out}")
    return {"out": str(out), "bytes": size}


def _or_config_error(action: Callable[[], Any]) -> Any:
    """What `action` returns; its ValueError is the user's to cure."""
    try:
        return action()
    except ValueError as error:
        raise ConfigError(str(error)) from None
