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
class DataConfig:
    """Where samples come from. `source`: stdlib, text or tokens; multitask, of stdlib's text or `files`; digits."""

    source: str = "stdlib"
    files: Any = None  # text: files, folders or globs, one or a list; tokens: a prepared folder. A list once validated
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    order: DataOrder = DataOrder.samples  # batches: the samples that fill no last global batch are never used
    valid_fraction: float = 0.05  # of the files (of the bytes, if there is only one file), or of the images
    max_mib: float | None = None  # use at most this much text
    cache_dir: str = "~/.cache/twohop"  # token files are kept here, named by a fingerprint of their sources
    multitask: MultitaskConfig | None = None

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
        require(
            self.multitask is None or self.source == "multitask",
            f"data.multitask has no use with data.source={self.source}: add data=multitask or leave it out",
        )
        require(
            self.multitask is not None or self.source != "multitask",
            "data.multitask is not set: data.source=multitask needs its tasks, as data=multitask has them",
        )
