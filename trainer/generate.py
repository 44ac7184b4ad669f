"""Text from a run's model."""

from dataclasses import replace

import torch

from twohop.models import Transformer, generate
from twohop.trainer.config import GenerateConfig
from twohop.trainer.data import Tokenizer
from twohop.trainer.errors import ConfigError
from twohop.trainer.setup import Run


def generate_text(run: Run, config: GenerateConfig) -> str:
    """The prompt and what the model makes of it. Every rank of the world must call this, and gets the same text.

    Raises:
        ConfigError: prompt and new tokens do not fit into the model's max_seq_len.
    """
    tokenizer = _tokenizer(run)
    if not isinstance(run.model, Transformer):
        raise ConfigError(f"model.kind={run.config.model.kind.value}: only a decoder continues a prompt")
    ids_BT = torch.tensor([tokenizer.encode(config.prompt)], device=run.device)
    generator = torch.Generator(run.device).manual_seed(config.seed)
    try:
        with run.engine.autocast():
            ids_BT = generate(run.model, ids_BT, config.max_new_tokens, config.temperature, config.top_k, generator)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return tokenizer.decode(ids_BT[0].tolist())


def fit_to_context(run: Run, config: GenerateConfig) -> GenerateConfig:
    """`config` with as many new tokens as the model's context leaves room for: a sample must not fail a whole run."""
    room = run.config.model.max_seq_len - len(_tokenizer(run).encode(config.prompt))
    return replace(config, max_new_tokens=max(0, min(config.max_new_tokens, room)))


def _tokenizer(run: Run) -> Tokenizer:
    if run.data.tokenizer is None:
        raise ConfigError(f"data.source={run.config.data.source} holds no text: its model has nothing to generate")
    return run.data.tokenizer
