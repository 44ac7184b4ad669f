"""Several tasks from one text: its lines, and what each of several transformations makes of them, as pairs.

They stand for the languages of a translation model: the tasks share their sources, differ in their targets, and some
have much more data than others. The source of a pair begins with a token that names the task, as multilingual models
name the language that they are asked for.

Shapes: B samples, S source positions, T target positions.
"""

import codecs
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twohop.trainer.config import DataConfig, TokenizerKind
from twohop.trainer.data.corpus import Document, stdlib_corpus, text_corpus
from twohop.trainer.data.samples import IGNORED, Batch
from twohop.trainer.data.tokenizer import Tokenizer, build_tokenizer
from twohop.trainer.errors import DataError

_FEWEST_WORDS = 3  # of a line that becomes a source
_FEWEST_LETTERS = 0.9  # letters and spaces of such a line, as a fraction: prose, not code and tables


def _by_word(transform: Callable[[str], str]) -> Callable[[str], str]:
    return lambda line: " ".join(transform(word) for word in line.split())


def _pig_latin(word: str) -> str:
    """Leading consonants move to the end, and "ay" follows them: "string" → "ingstray", "is" → "isway"."""
    start = re.match(r"[^aeiouAEIOU\W\d_]*", word)
    assert start is not None
    head, tail = start[0], word[start.end() :]
    return f"{tail}{head}ay" if head and tail else f"{word}way"


# Each maps a line of words, separated by single spaces, to another text.
TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda line: line,
    "swapcase": str.swapcase,
    "rot13": lambda line: codecs.encode(line, "rot13"),
    "no_vowels": lambda line: re.sub("[aeiouAEIOU]", "", line),
    "pig_latin": _by_word(_pig_latin),
    "mirror": _by_word(lambda word: word[::-1]),
    "reverse_words": lambda line: " ".join(reversed(line.split())),
    "sort_words": lambda line: " ".join(sorted(line.split())),
}


@dataclass(frozen=True)
class Sequences:
    """Token sequences of different lengths, one after the other."""

    ids: np.ndarray  # int32 [sum of the lengths]
    starts: np.ndarray  # int64 [count + 1]

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Sequences":
        """Joins them."""
        kept = [np.asarray(ids, dtype=np.int32) for ids in sequences]
        starts = np.cumsum([0, *(len(ids) for ids in kept)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, np.int32), *kept]), starts)

    @property
    def lengths(self) -> np.ndarray:
        """Length of every sequence."""
        return np.diff(self.starts)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.ids[self.starts[number] : self.starts[number + 1]].astype(np.int64))


class TaskPairs:
    """One split of all tasks: pairs (source, target), of which those of a task stand together.

    An epoch spreads the tasks evenly over its sample numbers. A task of n pairs has n^(1/τ) · n_max^(1 - 1/τ) of them,
    τ being the temperature: every pair comes at least once, and those of a small task the more often the higher τ
    (Arivazhagan 2019). A sample's pair depends on its number alone, and the number drawn next on the seed alone.
    """

    def __init__(
        self,
        sources: Sequences,
        targets: Sequences,
        pairs_by_task: Sequence[int],
        temperature: float,
        tokenizer: Tokenizer,
    ) -> None:
        self.sources, self.targets, self.end = sources, targets, tokenizer.end_of_document
        self.task_of_pair = np.repeat(np.arange(len(pairs_by_task)), pairs_by_task)
        self.pair_of_sample = spread(pairs_by_task, temperature)

    def __len__(self) -> int:
        return len(self.pair_of_sample)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`. Sources and targets are as wide as the longest of the batch.

        `ids_BT` is the target shifted by one place, behind the token that ends a document. Padding is that token too,
        hidden by the lengths and by targets that are IGNORED.
        """
        pairs = self.pair_of_sample[list(numbers)]
        sources, targets = [self.sources[p] for p in pairs], [self.targets[p] for p in pairs]
        width = max(len(target) for target in targets)
        target_BT = torch.full((len(pairs), width), IGNORED)
        ids_BT = torch.full((len(pairs), width), self.end)
        for row, target in enumerate(targets):
            target_BT[row, : len(target)] = target
            ids_BT[row, 1 : len(target)] = target[:-1]
        inputs = {
            "source_BS": torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=self.end),
            "source_length_B": torch.tensor([len(source) for source in sources]),
            "ids_BT": ids_BT,
            "length_B": torch.tensor([len(target) for target in targets]),
            "task_B": torch.from_numpy(self.task_of_pair[pairs]),
            "sample_B": torch.from_numpy(pairs),
        }
        return Batch(inputs, target_BT, inputs["task_B"])

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`: every token of a target, its end included."""
        return int(self.targets.lengths[self.pair_of_sample[list(numbers)]].sum())

    def target_entropy(self) -> float:
        """See `Samples`: the unigram entropy of all targets, each pair counted once."""
        counts = np.bincount(self.targets.ids)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())


def spread(pairs_by_task: Sequence[int], temperature: float) -> np.ndarray:
    """The pair of every sample of an epoch, int64; any stretch holds the tasks as the whole does: see `TaskPairs`."""
    most = max(pairs_by_task)
    pair, place, first = [], [], 0
    for count in pairs_by_task:
        share = round(count ** (1 / temperature) * most ** (1 - 1 / temperature))
        turn = np.arange(share)
        pair.append(first + turn % count)
        place.append((turn + 0.5) / share)
        first += count
    return np.concatenate(pair)[np.argsort(np.concatenate(place), kind="stable")]


@dataclass(frozen=True)
class TaskData:
    """Both splits of a multi-task corpus."""

    train: TaskPairs
    valid: TaskPairs
    tokenizer: Tokenizer
    vocab_size: int  # the tokenizer's, and one token more for each task
    fingerprint: str


def build_task_data(config: DataConfig, seq_len: int) -> TaskData:
    """The pairs of `config.multitask`, from the files of `data.files` or from the standard library's sources.

    No line of the validation split is in a pair of the training split, and there all tasks have the same lines, so
    that their losses can be compared. A pair of which one side is longer than `seq_len` tokens is left out. Nothing is
    written: some MiB of text take about a second.

    Raises:
        DataError: the text is missing or unreadable, or a task is left without pairs.
    """
    settings = config.multitask
    assert settings is not None
    if config.tokenizer.kind is TokenizerKind.bpe:
        raise DataError(
            "data.tokenizer.kind=bpe: data=multitask trains no tokenizer; use bytes, or kind=file with a tokenizer.json"
        )
    corpus = text_corpus(config) if config.files else stdlib_corpus(config)
    tokenizer = build_tokenizer(config.tokenizer, ())
    valid_lines = _lines(corpus.valid)
    seen = set(valid_lines)
    train_lines = [line for line in _lines(corpus.train) if line not in seen]
    make = _PairMaker(settings.tasks, tokenizer, seq_len)
    train = make.split("train", train_lines, settings.sizes or [1.0] * len(settings.tasks), settings.temperature)
    valid = make.split("valid", valid_lines, [1.0] * len(settings.tasks), 1.0)
    digest = hashlib.sha256(repr((settings.tasks, settings.temperature)).encode())
    for split in (train, valid):
        for array in (split.sources.ids, split.sources.starts, split.targets.ids, split.targets.starts):
            digest.update(array.tobytes())
    return TaskData(train, valid, tokenizer, make.vocab_size, digest.hexdigest())


class _PairMaker:
    """From lines to the token pairs of all tasks."""

    def __init__(self, tasks: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> None:
        self.tasks, self.tokenizer, self.seq_len = tasks, tokenizer, seq_len
        self.vocab_size = tokenizer.vocab_size + len(tasks)

    def split(self, name: str, lines: list[str], sizes: Sequence[float], temperature: float) -> TaskPairs:
        """Pairs of the first `size` of all lines, for each task."""
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        counts = []
        encoded_lines = self.tokenizer.encode_batch(lines)
        for task, (task_name, size) in enumerate(zip(self.tasks, sizes, strict=True)):
            count = math.ceil(size * len(lines))
            results = self.tokenizer.encode_batch([TASKS[task_name](line) for line in lines[:count]])
            before = len(sources)
            for line, result in zip(encoded_lines, results, strict=False):
                if max(len(line), len(result)) < self.seq_len:  # one token more on either side
                    sources.append([self.tokenizer.vocab_size + task, *line])
                    targets.append([*result, self.tokenizer.end_of_document])
            counts.append(len(sources) - before)
        if 0 in counts:
            raise DataError(
                f"data.multitask.tasks: no {name} pair of {self.tasks[counts.index(0)]} fits into "
                f"train.seq_len={self.seq_len}: use more text, longer sequences or larger data.multitask.sizes"
            )
        return TaskPairs(Sequences.of(sources), Sequences.of(targets), counts, temperature, self.tokenizer)


def encode_source(tokenizer: Tokenizer, task: int, text: str) -> list[int]:
    """A text as the source of a task, whose token stands first: the ids behind the tokenizer's own are the tasks'."""
    return [tokenizer.vocab_size + task, *tokenizer.encode(text)]


def _lines(documents: Iterable[Document]) -> list[str]:
    """The different lines of prose, without marks of comments, in an order that depends on their contents alone."""
    found = set()
    for document in documents:
        for block in document.blocks():
            for raw in block.splitlines():
                words = raw.strip("#*'\" \t").split()
                line = " ".join(words)
                letters = sum(character.isalpha() or character == " " for character in line)
                if len(words) >= _FEWEST_WORDS and letters >= _FEWEST_LETTERS * len(line):
                    found.add(line)
    return sorted(found, key=lambda line: hashlib.sha256(line.encode()).digest())
