"""`format=hf`: a folder that transformers' `AutoModelForCausalLM` and `AutoTokenizer` load without remote code."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch

from twohop.models.interop import InteropError, fit_family
from twohop.models.interop.files import CONFIG_FILE, write_index, write_tensors
from twohop.models.interop.transfer import Written, own_weights
from twohop.trainer.checkpoints.checkpoint import together
from twohop.trainer.config import ExportConfig, TensorType
from twohop.trainer.data import Tokenizer
from twohop.trainer.data.tokenizer import END_OF_DOCUMENT, TOKENIZER_FILE, LibraryTokenizer
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.setup import Run
from twohop.trainer.world import gather_objects, rank, say, world_size

DTYPES = {TensorType.fp32: torch.float32, TensorType.bf16: torch.bfloat16}


def export_hf(run: Run, config: ExportConfig) -> dict[str, Any]:
    """Write config.json, tokenizer and sharded safetensors to `config.out`, which appears whole or not at all.

    Every rank must call this; each writes files of its own, with its own experts.

    Raises:
        ConfigError: transformers has no class for the model.
        CheckpointError: the folder holds something already, or cannot be written.
    """
    try:
        family, values = fit_family(run.config.model)
    except InteropError as error:
        raise ConfigError(f"format=hf: {error}") from None
    assert config.out is not None
    out = Path(config.out).expanduser()
    unfinished = out.with_name(f".{out.name}.unfinished")
    together(lambda: _make_new(out, unfinished), only_rank_0=True)
    shards = list(_cut(own_weights(run.model, family, rank(), world_size(), DTYPES[config.dtype]), config.shard_mib))
    counts = gather_objects(len(shards))
    first, total = sum(counts[: rank()]), sum(counts)

    def write_shards() -> tuple[dict[str, str], int]:
        home: dict[str, str] = {}
        size = 0
        for number, shard in enumerate(shards, first + 1):
            file = f"model-{number:05d}-of-{total:05d}.safetensors"
            write_tensors(unfinished / file, shard)
            home |= {written.name: file for written in shard}
            size += sum(written.size for written in shard)
        return home, size

    def finish() -> None:
        write_index(unfinished, {name: file for home, _ in written for name, file in home.items()}, total_size)
        tokenizer = run.data.tokenizer
        ends = None if tokenizer is None else tokenizer.end_of_document
        tokens = {"bos_token_id": None, "eos_token_id": ends, "pad_token_id": None}
        dtype = str(DTYPES[config.dtype]).removeprefix("torch.")
        (unfinished / CONFIG_FILE).write_text(json.dumps(values | tokens | {"dtype": dtype}, indent=2) + "\n")
        if tokenizer is not None:
            _write_tokenizer(unfinished, tokenizer, run.config.model.max_seq_len)
        for file in unfinished.iterdir():  # safetensors lets nobody else read what it writes
            file.chmod((unfinished / CONFIG_FILE).stat().st_mode)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)

    try:
        written = together(write_shards)
        total_size = sum(size for _, size in written)
        together(finish, only_rank_0=True)
    except CheckpointError as error:
        together(lambda: shutil.rmtree(unfinished, ignore_errors=True), only_rank_0=True)
        raise CheckpointError(f"out={out}: {error}") from None
    say(f"{out}: {family.architecture}, {total_size:,} bytes in {total} files")
    return {"out": str(out), "architecture": family.architecture, "bytes": total_size}


def _make_new(out: Path, unfinished: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"out={out} holds something already: choose another folder, or delete it")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _cut(tensors: Iterable[Written], shard_mib: float) -> Iterator[list[Written]]:
    """Lists of tensors of at most `shard_mib` together, or of a single larger one."""
    shard: list[Written] = []
    size = 0
    for written in tensors:
        if shard and size + written.size > shard_mib * 2**20:
            yield shard
            shard, size = [], 0
        shard.append(written)
        size += written.size
    if shard:
        yield shard


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    if isinstance(tokenizer, LibraryTokenizer):
        tokenizer.save(directory)
        library = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    else:
        library = _byte_level()
        library.save(str(directory / TOKENIZER_FILE))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": library.id_to_token(tokenizer.end_of_document),
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _byte_level() -> tokenizers.Tokenizer:
    """Our tokenizer of bytes as one of the `tokenizers` library: a BPE without merges."""
    # The library spells bytes as GPT-2 does: printable ones as they are, the others from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocab = {spelling[byte]: byte for byte in range(256)} | {END_OF_DOCUMENT: 256}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens([END_OF_DOCUMENT])
    return library
