"""Text from a run's model."""

from dataclasses import replace

import torch

from twohop.models import EncoderDecoder, Transformer, generate, translate
from twohop.trainer.config import GenerateConfig
from twohop.trainer.data import Tokenizer
from twohop.trainer.data.multitask import encode_source
from twohop.trainer.errors import ConfigError
from twohop.trainer.setup import Run


def sample_text(run: Run) -> str | None:
    """What the end of a run shows: a continued prompt, or a line for each task; None for a model that does not write.

    Every rank of the world must call this.
    """
    if isinstance(run.model, EncoderDecoder):
        return _sample_translations(run)
    if not isinstance(run.model, Transformer) or run.data.tokenizer is None:
        return None
    return generate_text(run, fit_to_context(run, run.config.generate))


def generate_text(run: Run, config: GenerateConfig) -> str:
    """The prompt and what the model makes of it; of an encoder-decoder, what `config.task` makes of the prompt.

    Every rank of the world must call this, and gets the same text.

    Raises:
        ConfigError: prompt and new tokens do not fit into the model's max_seq_len, or the task is unknown.
    """
    tokenizer = _tokenizer(run)
    if isinstance(run.model, EncoderDecoder):
        return _translate_text(run, run.model, config)
    if config.task is not None:
        kind = run.config.model.kind.value
        raise ConfigError(f"generate.task={config.task} has no use with model.kind={kind}: leave it out")
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


def _translate_text(run: Run, model: EncoderDecoder, config: GenerateConfig) -> str:
    tokenizer = _tokenizer(run)
    if config.task not in run.data.tasks:
        raise ConfigError(f"generate.task={config.task}: use one of the run's tasks, {', '.join(run.data.tasks)}")
    task = run.data.tasks.index(config.task)
    source_1S = torch.tensor([encode_source(tokenizer, task, config.prompt)], device=run.device)
    length_1, task_1 = torch.tensor([source_1S.shape[1]], device=run.device), torch.tensor([task], device=run.device)
    room = min(config.max_new_tokens, model.config.max_seq_len)
    try:
        with run.engine.autocast():
            ids_1T = translate(model, source_1S, length_1, task_1, room, tokenizer.end_of_document)
    except ValueError as error:
        raise ConfigError(f"generate.prompt: {error}") from None
    return tokenizer.decode(ids_1T[0].tolist())


def _sample_translations(run: Run) -> str:
    """A line of the validation split for each task: what the model makes of the first samples."""
    assert isinstance(run.model, EncoderDecoder)
    tokenizer, batch = _tokenizer(run), run.data.valid.batch(range(len(run.data.tasks))).to(run.device)
    inputs = [batch.inputs[name] for name in ("source_BS", "source_length_B", "task_B")]
    with run.engine.autocast():
        ids_BT = translate(run.model, *inputs, run.config.train.seq_len, tokenizer.end_of_document)
    lines = []
    for source, length, task, ids in zip(*(x.tolist() for x in (*inputs, ids_BT)), strict=True):
        text, result = tokenizer.decode(source[1:length]), tokenizer.decode(ids)
        lines.append(f"{run.data.tasks[task]}: {text} → {result}")
    return "\n".join(lines)


def fit_to_context(run: Run, config: GenerateConfig) -> GenerateConfig:
    """`config` with as many new tokens as the model's context leaves room for: a sample must not fail a whole run."""
    room = run.config.model.max_seq_len - len(_tokenizer(run).encode(config.prompt))
    return replace(config, max_new_tokens=max(0, min(config.max_new_tokens, room)))


def _tokenizer(run: Run) -> Tokenizer:
    if run.data.tokenizer is None:
        raise ConfigError(f"data.source={run.config.data.source} holds no text: its model has nothing to generate")
    return run.data.tokenizer
