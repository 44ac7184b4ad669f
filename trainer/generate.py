"""Text from a run's model."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from twohop.models import EncoderDecoder, MoEModel, Transformer, build_model, generate, translate
from twohop.trainer.checkpoints.state import model_tensors
from twohop.trainer.config import GenerateConfig
from twohop.trainer.data import Tokenizer
from twohop.trainer.data.multitask import encode_source
from twohop.trainer.errors import ConfigError
from twohop.trainer.setup import Run
from twohop.trainer.world import exchanging

# A model of no more bytes than this comes whole to every process that writes with it: tokens come one at a time, and
# for each, every MoE layer would exchange messages, which take longer than all that is computed.
WHOLE_BYTES = 2**30


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
        return _translate_prompt(run, config)
    if config.task is not None:
        kind = run.config.model.kind.value
        raise ConfigError(f"generate.task={config.task} has no use with model.kind={kind}: leave it out")
    if not isinstance(run.model, Transformer):
        raise ConfigError(f"model.kind={run.config.model.kind.value}: only a decoder continues a prompt")
    model = writing_model(run)
    assert isinstance(model, Transformer)
    ids_BT = torch.tensor([tokenizer.encode(config.prompt)], device=run.device)
    generator = torch.Generator(run.device).manual_seed(config.seed)
    try:
        with run.engine.autocast():
            ids_BT = generate(model, ids_BT, config.max_new_tokens, config.temperature, config.top_k, generator)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return tokenizer.decode(ids_BT[0].tolist())


def translate_texts(
    model: EncoderDecoder, tokenizer: Tokenizer, tasks: Sequence[int], texts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """What an encoder-decoder makes of each text for the task of that number, greedily; see `translate`.

    Raises ValueError for a text, with its task's token, that is longer than the model's max_seq_len.
    """
    device = next(model.parameters()).device
    sources = [torch.tensor(encode_source(tokenizer, *pair)) for pair in zip(tasks, texts, strict=True)]
    source_BS = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True).to(device)
    lengths_B = torch.tensor([len(source) for source in sources], device=device)
    room = min(max_new_tokens, model.config.max_seq_len)
    end = tokenizer.end_of_document
    ids_BT = translate(model, source_BS, lengths_B, torch.tensor(tasks, device=device), room, end)
    # A model may also write the tokens of tasks, which are no text.
    return [tokenizer.decode(i for i in ids if i < tokenizer.vocab_size) for ids in ids_BT.tolist()]


def writing_model(run: Run) -> MoEModel:
    """The run's model; if it is spread over ranks and small, a whole copy of it, which gives the same text.

    Every rank of the world must call this.
    """
    state = model_tensors(run.model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())  # of a DTensor: of all ranks
    if size > WHOLE_BYTES or not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return run.model
    with exchanging("the whole model"):
        whole = {
            name.removeprefix("model."): tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in state.items()
        }
    model = build_model(run.config.model, device=run.device)
    model.load_state_dict(whole, assign=True)  # as they are, also in their type
    return model


def _translate_prompt(run: Run, config: GenerateConfig) -> str:
    if config.task not in run.data.tasks:
        raise ConfigError(f"generate.task={config.task}: use one of the run's tasks, {', '.join(run.data.tasks)}")
    task = run.data.tasks.index(config.task)
    model = writing_model(run)
    assert isinstance(model, EncoderDecoder)
    try:
        with run.engine.autocast():
            return translate_texts(model, _tokenizer(run), [task], [config.prompt], config.max_new_tokens)[0]
    except ValueError as error:
        raise ConfigError(f"generate.prompt: {error}") from None


def _sample_translations(run: Run) -> str:
    """A line of the validation split for each task, and what the model makes of it."""
    model = writing_model(run)
    assert isinstance(model, EncoderDecoder)
    tokenizer, inputs = _tokenizer(run), run.data.valid.batch(range(len(run.data.tasks))).inputs
    tasks, lengths = inputs["task_B"].tolist(), inputs["source_length_B"].tolist()
    texts = [tokenizer.decode(ids[1:n]) for ids, n in zip(inputs["source_BS"].tolist(), lengths, strict=True)]
    with run.engine.autocast():
        results = translate_texts(model, tokenizer, tasks, texts, run.config.train.seq_len)
    lines = [" ".join(result.splitlines()) for result in results]
    triples = zip(tasks, texts, lines, strict=True)
    return "\n".join(f"{run.data.tasks[task]}: {text} → {line}" for task, text, line in triples)


def fit_to_context(run: Run, config: GenerateConfig) -> GenerateConfig:
    """`config` with as many new tokens as the model's context leaves room for: a sample must not fail a whole run."""
    room = run.config.model.max_seq_len - len(_tokenizer(run).encode(config.prompt))
    return replace(config, max_new_tokens=max(0, min(config.max_new_tokens, room)))


def _tokenizer(run: Run) -> Tokenizer:
    if run.data.tokenizer is None:
        raise ConfigError(f"data.source={run.config.data.source} holds no text: its model has nothing to generate")
    return run.data.tokenizer
