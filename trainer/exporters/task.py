"""`format=task task=NAME`: one task of a model with task-level gates as a small model of its own.

`load_task(DIR).translate(["a line"])` uses it.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from twohop.models import EncoderDecoder, ModelConfig, build_model, parameter_counts
from twohop.models.extract import extract_task
from twohop.models.interop.family import InteropError
from twohop.models.interop.files import CONFIG_FILE, SINGLE_FILE, TensorFolder, write_tensors
from twohop.trainer.app import to_config
from twohop.trainer.checkpoints.checkpoint import together
from twohop.trainer.config import ExportConfig
from twohop.trainer.data import Tokenizer, load_tokenizer
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.exporters.hf import DTYPES
from twohop.trainer.generate import translate_texts
from twohop.trainer.setup import Run
from twohop.trainer.world import say


@dataclass(frozen=True)
class TaskModel:
    """A model of one task, with what turns text into its ids and back."""

    model: EncoderDecoder
    tokenizer: Tokenizer
    task: str
    number: int  # of the task among those that it was trained with, which names it in a source

    def translate(self, texts: list[str], max_new_tokens: int | None = None) -> list[str]:
        """What the task makes of each text, by the most probable token after each other.

        Raises ValueError for a text that is longer than the model's max_seq_len.
        """
        room = max_new_tokens or self.model.config.max_seq_len
        return translate_texts(self.model, self.tokenizer, [self.number] * len(texts), texts, room)


def export_task(run: Run, config: ExportConfig) -> dict[str, Any]:
    """Write the model of `config.task` to `config.out`: config.json, tokenizer.json, model.safetensors.

    Every rank must call this; rank 0 writes. The folder appears whole or not at all.

    Raises:
        ConfigError: the model has no task-level gates, or no such task.
        CheckpointError: the folder holds something already, or cannot be written.
    """
    tasks = run.data.tasks
    if config.task not in tasks:
        wanted = f"use one of {', '.join(tasks)}" if tasks else "the data of this run has no tasks"
        raise ConfigError(f"format=task task={config.task}: {wanted}")
    state = run.engine.model_state()

    def read(name: str) -> Tensor:
        tensor = state[f"model.{name}"]
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()

    number = tasks.index(config.task)
    try:
        model = extract_task(run.config.model, read, number)
    except ValueError as error:
        raise ConfigError(f"format=task: {error}") from None
    assert config.out is not None
    out, tokenizer = Path(config.out).expanduser(), run.data.tokenizer
    assert tokenizer is not None
    about = {"task": config.task, "number": number, "model": asdict(model.config)}
    together(lambda: _write(out, model, tokenizer, about, config), only_rank_0=True)
    whole, own = parameter_counts(run.config.model).total, parameter_counts(model.config).total
    say(f"{out}: {config.task}, {own:,} of {whole:,} parameters ({whole / own:.2f} times smaller)")
    return {"out": str(out), "parameters": own, "ratio": whole / own}


def load_task(directory: Path | str) -> TaskModel:
    """The model that `twohop export format=task` wrote to `directory`, on the CPU in fp32, ready to translate.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    directory = Path(directory)
    try:
        about = json.loads((directory / CONFIG_FILE).read_text())
        merged = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(ModelConfig), about["model"]))
        model = build_model(to_config(merged, ModelConfig))
        assert isinstance(model, EncoderDecoder)
        stored = TensorFolder(directory)
        model.load_state_dict({name: stored.read(name) for name in stored.names})
        return TaskModel(model.eval(), load_tokenizer(directory), about["task"], about["number"])
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RuntimeError, InteropError) as error:
        raise CheckpointError(f"{directory}: no model of a task, or a damaged one ({error}); export it again") from None


def _write(out: Path, model: EncoderDecoder, tokenizer: Tokenizer, about: dict[str, Any], config: ExportConfig) -> None:
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"out={out} holds something already: choose another folder, or delete it")
    unfinished.mkdir(parents=True)
    try:
        dtype = DTYPES[config.dtype]
        write_tensors(unfinished / SINGLE_FILE, [(name, x, dtype) for name, x in model.state_dict().items()])
        plain = json.dumps(about, indent=2, default=_value)
        (unfinished / CONFIG_FILE).write_text(plain + "\n")
        tokenizer.save(unfinished)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _value(item: object) -> Any:
    if isinstance(item, Enum):
        return item.value
    raise TypeError(f"{item!r} has no place in a configuration")
