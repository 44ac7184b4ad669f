"""Checks of the data's configuration, by itself and against model and batch; see `twohop.trainer.validate.groups`."""

import torch

from twohop.models.attention import build_attention
from twohop.models.config import ModelKind
from twohop.models.routers import ROUTERS
from twohop.trainer.config import Config, DataConfig
from twohop.trainer.data.build import CORPORA, corpus_config
from twohop.trainer.data.images import IMAGES
from twohop.trainer.data.multitask import TASKS
from twohop.trainer.errors import ConfigError
from twohop.trainer.validate.names import check_name, divisors


def check_data(config: DataConfig) -> None:
    """Raise a ConfigError unless source and files fit together."""
    check_name("data.source", config.source, [*CORPORA, "tokens", "mixture", "multitask", *IMAGES])
    for corpus in config.mixture:
        check_name("data.mixture.source", corpus.source, [*CORPORA, "tokens"])
        try:
            check_data(corpus_config(config, corpus))
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"data.mixture: {corpus.name}: {error}") from None
    if config.multitask is not None:
        for name in config.multitask.tasks:
            check_name("data.multitask.tasks", name, TASKS)
        return  # its text is that of data.files, or the standard library's
    if config.source in IMAGES:
        for key in ("files", "tokenizer", "max_mib"):
            value = getattr(config, key)
            if value != getattr(DataConfig(), key):
                raise ConfigError(f"data.{key}={value} has no use with data={config.source}: leave it out")
        return
    if config.source == "stdlib" and config.files:
        raise ConfigError(f"data.files={config.files} has no use with data=stdlib: add data=text or data=tokens")
    needed = {"text": "a file, folder or glob", "tokens": "the folder that `twohop prepare` has written"}
    if config.source in needed and not config.files:
        wanted = needed[config.source]
        raise ConfigError(f"data.files is not set: data={config.source} needs {wanted}, as in data.files=PATH")


def check_data_fits(config: Config) -> None:
    """Raise a ConfigError unless model and batch can take the data."""
    _check_kind(config)
    _check_documents(config)
    _check_lanes(config)


def _check_kind(config: Config) -> None:
    """Images need a ViT and pairs an encoder-decoder; all else is for decoders."""
    kind, source = config.model.kind, config.data.source
    special = dict.fromkeys(IMAGES, ModelKind.vit) | {"multitask": ModelKind.encoder_decoder}
    wanted = special.get(source, ModelKind.decoder)
    if kind is not wanted:
        cures = {ModelKind.vit: "add model=vmoe", ModelKind.encoder_decoder: "add model=task_moe"}
        fitting = next((name for name, other in special.items() if other is kind), "stdlib")
        cure = cures.get(wanted, f"add data={fitting}")
        raise ConfigError(f"model.kind={kind.value} cannot learn from data.source={source}: {cure}")
    router = config.model.moe.router.name
    if kind is ModelKind.vit and "vocab_size" in ROUTERS[router].sizes:
        raise ConfigError(f"model.moe.router.name={router}: patches have no ids in a vocabulary; use noisy")


def _check_documents(config: Config) -> None:
    if not config.data.document_mask:
        return
    if config.model.kind is not ModelKind.decoder:
        raise ConfigError(
            f"data.document_mask=true has no use with model.kind={config.model.kind.value}, whose sequences hold one "
            "thing each: leave it out"
        )
    with torch.device("meta"):
        separates = build_attention(config.model).separates_documents
    if not separates:
        raise ConfigError(
            f"data.document_mask=true: model.attention.kind={config.model.attention.kind} sees across documents: use "
            "another kind, such as full or sliding, or leave the mask out"
        )


def _check_lanes(config: Config) -> None:
    for hf in (config.data.hf, *(corpus.hf for corpus in config.data.mixture)):
        if hf is not None and config.train.global_batch % hf.lanes:
            raise ConfigError(
                f"data.hf.lanes={hf.lanes} does not divide train.global_batch={config.train.global_batch}: "
                f"use one of {divisors(config.train.global_batch)}"
            )
