"""Where samples come from."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from twohop.trainer.config.checks import listed, require, require_at_least


class TokenizerKind(Enum):
    """`bytes`: one token a byte; `bpe`: trained on the corpus; `file`: any tokenizer.json."""

    bytes = "bytes"
    bpe = "bpe"
    file = "file"


class DataOrder(Enum):
    """What an epoch shuffles: `samples`, or whole global `batches` that are put together once and come again."""

    samples = "samples"
    batches = "batches"


@dataclass
class TokenizerConfig:
    """Text to token ids."""

    kind: TokenizerKind = TokenizerKind.bytes
    vocab_size: int = 4096  # of a BPE that is trained
    file: str | None = None  # a tokenizer.json, for kind=file

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.file:
            require(self.file is not None, "data.tokenizer.file is not set: kind=file needs a tokenizer.json")
        else:
            require(
                self.file is None,
                f"data.tokenizer.file={self.file} has no use with kind={self.kind.value}: add data.tokenizer.kind=file",
            )


@dataclass
class MultitaskConfig:
    """The tasks of data=multitask: their names in `twohop.trainer.data.multitask`, and how much data each has."""

    tasks: list[str] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)  # the part of the training lines that each task has; []: all
    temperature: float = 1.0  # τ: a task of n pairs is drawn in proportion to n^(1/τ); 1 leaves the sizes as they are

    def __post_init__(self) -> None:
        tasks, sizes = self.tasks, self.sizes
        require(
            bool(tasks) and len(set(tasks)) == len(tasks),
            f"data.multitask.tasks={tasks}: name one task or more, each once",
        )
        require(
            len(sizes) in (0, len(tasks)) and all(0 < size <= 1 for size in sizes),
            f"data.multitask.sizes={sizes}: list a number in (0, 1] for each of the {len(tasks)} tasks, or nothing",
        )
        require_at_least(1, "data.multitask", self, "temperature")


@dataclass
class HFConfig:
    """data=hf: what Hugging Face's `datasets` loads, from `data.files` or from the hub; no data set's code is run."""

    name: str | None = None  # on the hub, such as allenai/c4; null: data.files
    subset: str | None = None  # of a data set that has several
    revision: str | None = None  # branch, tag or commit on the hub
    text_key: str = "text"  # the column with the text: a row is a document
    train_split: str = "train"  # also a part, as `datasets` writes it: train[:10%] (not of a stream)
    valid_split: str | None = None  # null: data.valid_fraction of the training split's rows
    streaming: bool = False  # read while training, without a copy on the disk
    # Of a stream: parts that are read side by side, a divisor of train.global_batch; a rank reads those of its samples.
    lanes: int = 1
    shuffle: int = 1  # of a stream: windows of a lane that are shuffled among themselves; 1: none
    valid_mib: float = 1.0  # of a stream: text that validates, read once

    def __post_init__(self) -> None:
        require(
            self.name is not None or self.revision is None,
            f"data.hf.revision={self.revision} has no use with data.files: set data.hf.name or leave it out",
        )
        require(
            self.valid_split != self.train_split,
            f"data.hf.valid_split={self.valid_split} is the training split too: name another one, or use null",
        )
        require_at_least(1, "data.hf", self, "lanes", "shuffle")
        require(self.valid_mib > 0, f"data.hf.valid_mib={self.valid_mib}: use a positive number of MiB")
        for key, default in (("lanes", 1), ("shuffle", 1), ("valid_mib", 1.0)):
            value = getattr(self, key)
            require(
                self.streaming or value == default,
                f"data.hf.{key}={value} has no use with data.hf.streaming=false: leave it out",
            )


@dataclass
class CorpusConfig:
    """A corpus of data=mixture. It has `source`, `files`, `max_mib` and `hf` as `DataConfig` has them."""

    name: str = ""  # in metrics and errors; empty: the source
    weight: float = 1.0  # its share of the training samples is weight ÷ the sum of all weights
    source: str = "text"
    files: Any = None
    max_mib: float | None = None
    hf: HFConfig | None = None

    def __post_init__(self) -> None:
        self.name = self.name or self.source
        self.files = listed(self.files, str, "data.mixture.files", "a path, or a list of paths")
        require(self.weight > 0, f"data.mixture: {self.name} has weight={self.weight}: use a positive one")


@dataclass
class DataConfig:
    """Where samples come from. `source`: stdlib, text, hf or tokens, or a mixture of them; multitask; digits."""

    source: str = "stdlib"
    # text, hf: files, folders or globs, one or a list; tokens: a prepared folder. A list once validated.
    files: Any = None
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    order: DataOrder = DataOrder.samples  # batches: the samples that fill no last global batch are never used
    document_mask: bool = False  # the documents of a window neither see nor predict each other
    prefetch: int | None = None  # steps whose batches a thread makes ahead; null: 1 on a GPU, 0 on the CPU
    valid_fraction: float = 0.05  # of the files (of the bytes, if there is only one file), or of the images
    max_mib: float | None = None  # use at most this much text
    cache_dir: str = "~/.cache/twohop"  # token files are kept here, named by a fingerprint of their sources
    multitask: MultitaskConfig | None = None
    hf: HFConfig | None = None
    mixture: list[CorpusConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files = listed(self.files, str, "data.files", "a path, or a list of paths")
        require(
            0 < self.valid_fraction < 1,
            f"data.valid_fraction={self.valid_fraction}: use a value between 0 and 1, for example 0.05",
        )
        require(
            self.max_mib is None or self.max_mib > 0,
            f"data.max_mib={self.max_mib}: use a positive number of MiB, or null for all text",
        )
        require(self.prefetch is None or self.prefetch >= 0, f"data.prefetch={self.prefetch}: use 0 or more, or null")
        for key, what in (("multitask", "tasks"), ("hf", "keys")):
            value, wanted = getattr(self, key), self.source == key
            require(
                value is None or wanted,
                f"data.{key} has no use with data.source={self.source}: add data={key} or leave it out",
            )
            require(
                value is not None or not wanted,
                f"data.{key} is not set: data.source={key} needs its {what}, as data={key} has them",
            )
        if self.hf is not None:
            require(
                bool(self.files) != (self.hf.name is not None),
                f"data.files={self.files} with data.hf.name={self.hf.name}: data=hf needs either files or the name of "
                "a data set on the hub",
            )
            if self.hf.streaming:
                self._check_stream()
        self._check_mixture()

    def _check_stream(self) -> None:
        for key, value, unwanted, cure in (
            ("tokenizer.kind", self.tokenizer.kind.value, "bpe", "use bytes, or kind=file with a tokenizer.json"),
            ("order", self.order.value, "batches", "leave it out"),
            ("document_mask", self.document_mask, True, "leave it out, or prepare the data first"),
            ("max_mib", self.max_mib, self.max_mib or 0, "leave it out: train.steps says how much is read"),
        ):
            require(value != unwanted, f"data.{key}={value} does not go with data.hf.streaming=true: {cure}")

    def _check_mixture(self) -> None:
        names = [corpus.name for corpus in self.mixture]
        if self.source != "mixture":
            require(not names, f"data.mixture={names} has no use with data.source={self.source}: add data=mixture")
            return
        require(
            len(names) > 1 and len(set(names)) == len(names),
            f"data.mixture={names}: list two corpora or more, each with a name of its own, as in "
            "data.mixture=[{name:code,source:stdlib,weight:3},{name:prose,files:book.txt}]",
        )
        for key in ("files", "max_mib"):
            value = getattr(self, key)
            require(not value, f"data.{key}={value} has no use with data=mixture: give it to a corpus of data.mixture")
        require(
            self.order is DataOrder.samples,
            f"data.order={self.order.value} has no use with data=mixture, whose corpora have epochs of their own: "
            "leave it out",
        )
        require(
            self.tokenizer.kind is not TokenizerKind.bpe,
            "data.tokenizer.kind=bpe: the corpora of data=mixture share a tokenizer: use bytes, or kind=file with the "
            "tokenizer.json that `twohop prepare` has trained on one of them",
        )
        total = sum(corpus.weight for corpus in self.mixture)
        for corpus in self.mixture:
            require(
                corpus.weight >= total / 2**16,
                f"data.mixture: {corpus.name} has weight={corpus.weight}, less than 1/65536 of all: raise it, or leave "
                "the corpus out",
            )
