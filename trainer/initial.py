"""Where the first weights of a run come from: the seed, a folder of transformers, or a dense model to be upcycled.

`init.from_hf=DIR` decides all of model.* but what training is free to choose; `init.upcycle_from=…` decides all but
the MoE layers. On the command line, model and tokenizer are therefore taken from there, unless they are given.
"""

from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from twohop.models import MoEModel, build_model, init_weights
from twohop.models.config import ModelConfig, MoEConfig
from twohop.models.interop import Family, InteropError, TensorFolder, differences, read_folder
from twohop.models.interop.transfer import load_weights
from twohop.models.upcycle import check_upcycling, upcycle
from twohop.trainer.checkpoints.checkpoint import CheckpointStore, load_tensors
from twohop.trainer.checkpoints.state import model_tensors
from twohop.trainer.config import Config
from twohop.trainer.data.tokenizer import TOKENIZER_FILE
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.run_folder import CHECKPOINTS, CONFIG_FILE, read_config
from twohop.trainer.setup import Run, model_identity
from twohop.trainer.world import say

MODEL_OPTION = "of_init"  # the option of the group `model` that holds the other model's configuration


class Origin(NamedTuple):
    """Another model: where it lies, its configuration, and its family; None: it is a run of ours."""

    directory: Path
    config: ModelConfig
    family: Family | None


def with_origin(args: list[str]) -> list[str]:
    """The arguments of `twohop train`, with model and tokenizer of what `init` names, where they say nothing of them.

    Raises:
        ConfigError: it names no model that can be read, or several.
    """
    keys = ("init.from_hf", "init.upcycle_from")
    named = [arg for arg in args if arg.split("=", 1)[0].lstrip("+") in keys]
    if not named:
        return args
    try:
        override = OverridesParser.create().parse_override(named[0])
    except OverrideParseException:
        return args  # Hydra says what is wrong with it
    value = override.value()
    if not isinstance(value, str) or override.is_sweep_override():
        raise ConfigError(f"{named[0]}: name one folder; each model wants a command of its own")
    origin = _origin(named[0].split("=", 1)[0], Path(value).expanduser())
    plain = OmegaConf.create({key: _plain(value) for key, value in asdict(origin.config).items()})
    ConfigStore.instance().store(group="model", name=MODEL_OPTION, node=plain, provider="twohop")
    added = [] if any(arg.startswith("model=") for arg in args) else [f"model={MODEL_OPTION}"]
    tokenizer = origin.directory.resolve() / TOKENIZER_FILE
    told = any(arg.startswith(("data.tokenizer", "data=tokens")) for arg in args)
    if origin.family is not None and tokenizer.is_file() and not told:
        added += ["data.tokenizer.kind=file", f"data.tokenizer.file='{tokenizer}'"]
    return [*added, *args]


def check_init(config: Config) -> None:
    """Raise a ConfigError unless the model is what `init` makes it."""
    if config.init.from_hf is not None:
        origin = _origin("init.from_hf", Path(config.init.from_hf).expanduser())
        _refuse_differences("init.from_hf", config.model, origin)
    elif config.init.upcycle_from is not None:
        origin = _origin("init.upcycle_from", Path(config.init.upcycle_from).expanduser())
        if origin.config.experts_by_layer:
            raise ConfigError(f"init.upcycle_from={origin.directory} has experts already: name a dense model")
        try:
            check_upcycling(config.model)
        except ValueError as error:
            raise ConfigError(f"init.upcycle_from={origin.directory}: {error}") from None
        _refuse_differences("init.upcycle_from", replace(config.model, moe=MoEConfig()), origin)


def start_weights(run: Run) -> None:
    """Set the weights that training begins with. Every rank of the world must call this.

    Raises:
        ConfigError: what `init` names is no model for this configuration, or lacks a tensor.
        CheckpointError: a run to be upcycled has no whole checkpoint.
    """
    init, model = run.config.init, run.model
    init_weights(model, run.config.seed)
    check_init(run.config)
    try:
        if init.from_hf is not None:
            origin = _origin("init.from_hf", Path(init.from_hf).expanduser())
            _load_folder(model, origin)
        elif init.upcycle_from is not None:
            origin = _origin("init.upcycle_from", Path(init.upcycle_from).expanduser())
            upcycle(model, _dense_model(origin, run))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _origin(key: str, directory: Path) -> Origin:
    try:
        if key.endswith("upcycle_from") and (directory / CONFIG_FILE).is_file():
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), read_config(directory)))
            assert isinstance(config, Config)
            return Origin(directory, config.model, None)
        family, model = read_folder(directory)
        return Origin(directory, model, family)
    except InteropError as error:
        raise ConfigError(f"{key}: {error}") from None


def _refuse_differences(key: str, ours: ModelConfig, origin: Origin) -> None:
    different = differences(ours, origin.config)
    if origin.family is None and origin.config.vocab_size is None:
        different.pop("model.vocab_size", None)  # the run's tokenizer has decided it; the checkpoint knows
    if ours.vocab_size is None and len(different) > 1:
        different.pop("model.vocab_size", None)  # the data would decide it; another key says more
    if different:
        name, (here, there) = next(iter(different.items()))
        raise ConfigError(
            f"{name}={here}, but {key}={origin.directory} has {there}: leave {name} and model=… out, "
            "so that they are taken from there"
        )


def _load_folder(model: MoEModel, origin: Origin) -> None:
    assert origin.family is not None
    say(f"weights from {origin.directory} ({origin.family.architecture})")
    load_weights(model, origin.family, TensorFolder(origin.directory))


def _dense_model(origin: Origin, run: Run) -> MoEModel:
    """The whole dense model, on the CPU of every rank."""
    config = replace(origin.config, vocab_size=run.config.model.vocab_size)
    dense = build_model(config)
    if origin.family is not None:
        _load_folder(dense, origin)
        return dense
    checkpoint = CheckpointStore(origin.directory / CHECKPOINTS, log=say).latest()
    if checkpoint is None:
        raise CheckpointError(f"init.upcycle_from={origin.directory}: holds no checkpoint; train it first")
    if checkpoint.identity.get("data.fingerprint") != run.data.fingerprint:
        say(f"{origin.directory} was trained on other data; its tokenizer must be the same")
    load_tensors(checkpoint, model_tensors(dense), model_identity(replace(run.config, model=config)))
    return dense


def _plain(value: Any) -> Any:
    """Enums as their names, as YAML would write them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.name if isinstance(value, Enum) else value
