"""From `DataConfig` to token windows, through a cache of token files."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from twohop.trainer.config import DataConfig
from twohop.trainer.data.corpus import Corpus, Document, stdlib_corpus, text_corpus
from twohop.trainer.data.documents import DocumentWindows
from twohop.trainer.data.hf import hf_corpus
from twohop.trainer.data.images import IMAGES, build_image_data
from twohop.trainer.data.multitask import build_task_data
from twohop.trainer.data.samples import Samples
from twohop.trainer.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer, tokenizer_settings
from twohop.trainer.data.tokens import TokenWindows, open_tokens, read_header, write_tokens
from twohop.trainer.errors import DataError

CORPORA: dict[str, Callable[[DataConfig], Corpus]] = {"stdlib": stdlib_corpus, "text": text_corpus, "hf": hf_corpus}
Log = Callable[[str], None]
FORMAT = 1  # of the token files: a higher number makes earlier caches invisible
_ENCODE_AT_ONCE = 32  # blocks of text


@dataclass(frozen=True)
class Data:
    """Both splits, how to read them, and a SHA-256 that tells this data from any other."""

    train: Samples
    valid: Samples
    num_classes: int  # of a target: the tokenizer's vocabulary, or the classes of images
    tokenizer: Tokenizer | None  # None: not text
    fingerprint: str
    tasks: tuple[str, ...] = ()  # names of what a batch's task_B numbers; (): it has no tasks
    image_shape: tuple[int, int, int] | None = None  # channels, height, width; None: no images
    unit: str = "token"  # what a target is, in words


def build_data(config: DataConfig, seq_len: int, log: Log = print) -> Data:
    """The data of a run. Any number of processes may call this at once: one writes the token files, all map them.

    Raises:
        DataError: a source is missing, empty, unreadable, damaged or shorter than seq_len + 1 tokens.
    """
    if config.source == "multitask":
        return _task_data(config, seq_len)
    if config.source in IMAGES:
        made = build_image_data(config.source, config.valid_fraction)
        return Data(
            made.train, made.valid, made.num_classes, None, made.fingerprint, image_shape=made.image_shape, unit="image"
        )
    folder = _prepared_folder(config) if config.source == "tokens" else prepare(config, None, log)
    tokenizer = load_tokenizer(folder)
    train, train_header = open_tokens(folder / "train")
    valid, valid_header = open_tokens(folder / "valid")

    def windows(tokens: np.ndarray, split: str) -> TokenWindows:
        if config.document_mask:
            return DocumentWindows(tokens, seq_len, split, tokenizer.end_of_document)
        return TokenWindows(tokens, seq_len, split)

    return Data(
        train=windows(train, "train"),
        valid=windows(valid, "valid"),
        num_classes=tokenizer.vocab_size,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(f"{train_header.sha256} {valid_header.sha256}".encode()).hexdigest(),
    )


def _task_data(config: DataConfig, seq_len: int) -> Data:
    assert config.multitask is not None
    made = build_task_data(config, seq_len)
    names = tuple(config.multitask.tasks)
    return Data(made.train, made.valid, made.vocab_size, made.tokenizer, made.fingerprint, names)


def prepare(config: DataConfig, directory: Path | None = None, log: Log = print) -> Path:
    """Write the token files of `config` to `directory`, or to the cache (None), unless they are there already.

    The folder appears whole or not at all. Returns it; `data=tokens data.files=[FOLDER]` trains from it.

    Raises:
        DataError: a source is missing, empty or unreadable, or `directory` holds something else.
    """
    if config.source not in CORPORA:
        raise DataError(f"data.source={config.source}: no text to tokenise; use one of {', '.join(CORPORA)}")
    corpus = CORPORA[config.source](config)
    settings = tokenizer_settings(config.tokenizer)
    source = {"format": FORMAT, "corpus": corpus.name, "fingerprint": corpus.fingerprint(), "tokenizer": settings}
    if directory is None:
        key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        directory = Path(config.cache_dir).expanduser() / f"{corpus.name}-{settings['kind']}-{key[:16]}"
    if not _is_prepared(directory, source):
        log(f"tokenising {len(corpus.train) + len(corpus.valid)} documents of {corpus.name} into {directory}")
        try:
            _write_folder(directory, corpus, config, source)
        except OSError as error:
            raise DataError(
                f"{directory}: cannot be written ({error.strerror}); choose another folder or data.cache_dir"
            ) from None
    return directory


def _prepared_folder(config: DataConfig) -> Path:
    if len(config.files) != 1:
        raise DataError(f"data.files={config.files}: data=tokens needs exactly one folder that `twohop prepare` made")
    return Path(config.files[0]).expanduser()


def _is_prepared(directory: Path, source: dict[str, Any]) -> bool:
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if read_header(directory / "train").source == source:
        return True
    raise DataError(f"{directory}: holds tokens of another corpus or tokenizer; choose another folder or delete it")


def _write_folder(directory: Path, corpus: Corpus, config: DataConfig, source: dict[str, Any]) -> None:
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        tokenizer = build_tokenizer(config.tokenizer, (block for doc in corpus.train for block in doc.blocks()))
        tokenizer.save(unfinished)
        for split, documents in (("train", corpus.train), ("valid", corpus.valid)):
            write_tokens(unfinished / split, _encode(documents, tokenizer), tokenizer, source)
        try:
            os.rename(unfinished, directory)
        except OSError:
            # Another process may have finished first, with the same content.
            if not _is_prepared(directory, source):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of all documents, each closed by the end-of-document token."""
    ends = ("", [tokenizer.end_of_document])
    texts = (item for doc in documents for item in (*((block, []) for block in doc.blocks()), ends))
    while batch := list(islice(texts, _ENCODE_AT_ONCE)):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for ids, (_, closing) in zip(encoded, batch, strict=True):
            yield ids + closing
