"""From `DataConfig` to token windows, through a cache of token files."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from twohop.trainer.config import CorpusConfig, DataConfig
from twohop.trainer.data.corpus import Corpus, Document, stdlib_corpus, text_corpus
from twohop.trainer.data.documents import DocumentWindows
from twohop.trainer.data.hf import (
    describe,
    hf_corpus,
    load_split,
    open_lane,
    pinned_revision,
    stream_identity,
    stream_validation,
    training_texts,
)
from twohop.trainer.data.images import IMAGES, build_image_data
from twohop.trainer.data.mixture import Joined
from twohop.trainer.data.multitask import build_task_data
from twohop.trainer.data.order import Mixture
from twohop.trainer.data.samples import Samples
from twohop.trainer.data.stream import Lane, StreamWindows
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
    tokenizer_digest: str | None = None  # SHA-256 of the tokenizer.json
    tasks: tuple[str, ...] = ()  # names of what a batch's task_B numbers; (): it has no tasks
    corpora: tuple[str, ...] = ()  # of a mixture
    mixture: Mixture | None = None  # how the samples of `train` are drawn; None: as `data.order` says
    image_shape: tuple[int, int, int] | None = None  # channels, height, width; None: no images
    unit: str = "token"  # what a target is, in words

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of what a batch's group_B numbers, for losses by task or by corpus; (): nothing."""
        return self.tasks or self.corpora

    @property
    def grouped_by(self) -> str:
        """What `groups` are."""
        return "corpus" if self.corpora else "task"


def build_data(config: DataConfig, seq_len: int, log: Log = print, global_batch: int = 1) -> Data:
    """The data of a run. Any number of processes may call this at once: one writes the token files, all map them.

    `global_batch` says how many samples of a stream are wanted at once.

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
    if config.source == "mixture":
        return _mixed_data(config, seq_len, log, global_batch)
    if config.hf is not None and config.hf.streaming:
        return _stream_data(pinned_revision(config), seq_len, log, global_batch)
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
        tokenizer_digest=train_header.tokenizer,
    )


def _stream_data(config: DataConfig, seq_len: int, log: Log, global_batch: int) -> Data:
    hf, settings = config.hf, tokenizer_settings(config.tokenizer)
    assert hf is not None
    source = {"format": FORMAT, "corpus": "hf-stream", "stream": stream_identity(config), "tokenizer": settings}
    key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
    folder = Path(config.cache_dir).expanduser() / f"hf-stream-{settings['kind']}-{key[:16]}"
    if not _is_prepared(folder, source):
        log(f"reading {hf.valid_mib} MiB of {describe(config)} for validation into {folder}")
        _write_folder(folder, {"valid": stream_validation(config)}, config, source)
    tokenizer = load_tokenizer(folder)
    valid, header = open_tokens(folder / "valid")
    rows = load_split(config, hf.train_split, streaming=True)

    def make_lane(lane: int, block: int) -> Lane:
        bookmarks = folder / f"bookmarks-{seq_len}-{block}" / f"lane-{lane}"
        texts = partial(training_texts, config=config)
        return Lane(partial(open_lane, rows, lane, hf.lanes), texts, tokenizer, seq_len, block, bookmarks)

    return Data(
        train=StreamWindows(make_lane, hf.lanes, seq_len, global_batch, hf.shuffle),
        valid=TokenWindows(valid, seq_len, "valid"),
        num_classes=tokenizer.vocab_size,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256(f"{key} {header.sha256}".encode()).hexdigest(),
        tokenizer_digest=header.tokenizer,
    )


def _mixed_data(config: DataConfig, seq_len: int, log: Log, global_batch: int) -> Data:
    parts = [build_data(corpus_config(config, corpus), seq_len, log, global_batch) for corpus in config.mixture]
    weights = tuple(corpus.weight for corpus in config.mixture)
    names = tuple(corpus.name for corpus in config.mixture)
    for name, part in zip(names, parts, strict=True):
        if part.tokenizer_digest != parts[0].tokenizer_digest:
            raise DataError(
                f"data.mixture: {name} has another tokenizer than {names[0]}: prepare both with the same "
                "data.tokenizer.file"
            )
    told = repr([(weight, part.fingerprint) for weight, part in zip(weights, parts, strict=True)])
    return replace(
        parts[0],
        train=Joined([part.train for part in parts]),
        valid=Joined([part.valid for part in parts], weights),
        fingerprint=hashlib.sha256(told.encode()).hexdigest(),
        corpora=names,
        mixture=Mixture(tuple(len(part.train) for part in parts), weights),
    )


def corpus_config(config: DataConfig, corpus: CorpusConfig) -> DataConfig:
    """A corpus of a mixture as data of its own: what the corpora have in common is that of the mixture."""
    own = {key: getattr(corpus, key) for key in ("source", "files", "max_mib", "hf")}
    return replace(config, mixture=[], **own)


def _task_data(config: DataConfig, seq_len: int) -> Data:
    assert config.multitask is not None
    made = build_task_data(config, seq_len)
    names = tuple(config.multitask.tasks)
    return Data(made.train, made.valid, made.vocab_size, made.tokenizer, made.fingerprint, tasks=names)


def prepare(config: DataConfig, directory: Path | None = None, log: Log = print) -> Path:
    """Write the token files of `config` to `directory`, or to the cache (None), unless they are there already.

    The folder appears whole or not at all. Returns it; `data=tokens data.files=[FOLDER]` trains from it.

    Raises:
        DataError: a source is missing, empty or unreadable, or `directory` holds something else.
    """
    if config.source not in CORPORA:
        raise DataError(f"data.source={config.source}: no text to tokenise; use one of {', '.join(CORPORA)}")
    if config.hf is not None and config.hf.streaming:
        raise DataError("data.hf.streaming=true has no use with prepare, which reads all: leave it out")
    corpus = CORPORA[config.source](config)
    settings = tokenizer_settings(config.tokenizer)
    source = {"format": FORMAT, "corpus": corpus.name, "fingerprint": corpus.fingerprint(), "tokenizer": settings}
    if directory is None:
        key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        directory = Path(config.cache_dir).expanduser() / f"{corpus.name}-{settings['kind']}-{key[:16]}"
    if not _is_prepared(directory, source):
        log(f"tokenising {len(corpus.train) + len(corpus.valid)} documents of {corpus.name} into {directory}")
        try:
            _write_folder(directory, {"train": corpus.train, "valid": corpus.valid}, config, source)
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
    if read_header(directory / "valid").source == source:
        return True
    raise DataError(f"{directory}: holds tokens of another corpus or tokenizer; choose another folder or delete it")


def _write_folder(
    directory: Path, splits: Mapping[str, Iterable[Document]], config: DataConfig, source: dict[str, Any]
) -> None:
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        blocks = (block for document in splits.get("train", ()) for block in document.blocks())
        tokenizer = build_tokenizer(config.tokenizer, blocks)
        tokenizer.save(unfinished)
        for split, documents in splits.items():
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
