"""Token files: raw little-endian integers, mapped into memory, beside a small JSON header.

`train.bin` holds the ids of all documents of a split one after the other, each closed by the tokenizer's
end-of-document token; `train.json` says how to read it and holds its SHA-256.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twohop.trainer.data.samples import Batch
from twohop.trainer.data.tokenizer import TOKENIZER_FILE, Tokenizer
from twohop.trainer.errors import DataError

_HASH_BLOCK = 8 << 20  # bytes
_COUNT_BLOCK = 1 << 22  # tokens


@dataclass(frozen=True)
class Header:
    """What `NAME.json` says about `NAME.bin`."""

    dtype: str  # uint8, uint16 or uint32, little-endian
    count: int  # tokens
    vocab_size: int
    tokenizer: str  # SHA-256 of the tokenizer.json beside it
    sha256: str  # of the whole .bin file
    source: dict[str, Any]  # what the tokens were made from


def sha256(file: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_tokens(path: Path, chunks: Iterable[Sequence[int]], tokenizer: Tokenizer, source: dict[str, Any]) -> Header:
    """Write `path`.bin and `path`.json beside the saved `tokenizer`, in the smallest integers that hold its ids."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    digest, count = hashlib.sha256(), 0
    with path.with_suffix(".bin").open("wb") as file:
        for ids in chunks:
            raw = np.asarray(ids, dtype=dtype.newbyteorder("<")).tobytes()
            file.write(raw)
            digest.update(raw)
            count += len(ids)
    saved = sha256(path.with_name(TOKENIZER_FILE))
    header = Header(dtype.name, count, tokenizer.vocab_size, saved, digest.hexdigest(), source)
    path.with_suffix(".json").write_text(json.dumps(asdict(header), indent=2) + "\n")
    return header


def read_header(path: Path) -> Header:
    """The header of the token file `path`.bin.

    Raises:
        DataError: there is none, or it is damaged.
    """
    file = path.with_suffix(".json")
    try:
        header = Header(**json.loads(file.read_text()))
        sound = header.dtype in ("uint8", "uint16", "uint32") and header.count > 0
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; is this a folder that `twohop prepare` made?") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: damaged header ({error}); delete the folder and prepare it again") from None
    if not sound:
        raise DataError(f"{file}: damaged header ({header.count} tokens of type {header.dtype}); prepare it again")
    return header


def open_tokens(path: Path) -> tuple[np.ndarray, Header]:
    """Map `path`.bin into memory: its ids [count] and its header.

    Size and SHA-256 are checked first, those of the tokenizer too.

    Raises:
        DataError: a file is missing, truncated or altered.
    """
    header, file = read_header(path), path.with_suffix(".bin")
    dtype = np.dtype(header.dtype).newbyteorder("<")
    expected = header.count * dtype.itemsize
    cure = "delete the folder and prepare it again"
    try:
        size = file.stat().st_size
        if size != expected:
            raise DataError(f"{file}: truncated or altered ({size} bytes instead of {expected}); {cure}")
        for part, expected_digest in ((file, header.sha256), (path.with_name(TOKENIZER_FILE), header.tokenizer)):
            if sha256(part) != expected_digest:
                raise DataError(f"{part}: altered (its SHA-256 is not the one in {path.name}.json); {cure}")
        return np.memmap(file, dtype=dtype, mode="r"), header
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); {cure}") from None


class TokenWindows:
    """A split as training samples: non-overlapping windows of seq_len + 1 tokens with stride seq_len.

    Neighbours share one token, so that every token but the first is predicted exactly once; what is left at
    the end (fewer than seq_len tokens) is not used.

    Raises:
        DataError: the split is shorter than one window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, split: str) -> None:
        if len(tokens) <= seq_len:
            raise DataError(
                f"train.seq_len={seq_len}: the {split} split has only {len(tokens)} tokens; "
                f"use train.seq_len<={len(tokens) - 1}, more text or another data.valid_fraction"
            )
        self.tokens = tokens
        self.seq_len = seq_len

    @property
    def num_tokens(self) -> int:
        """Tokens in the split."""
        return len(self.tokens)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def window(self, index: int) -> torch.Tensor:
        """Sample `index` in [0, len(self)) as int64 [seq_len + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.seq_len
        return torch.from_numpy(self.tokens[start : start + self.seq_len + 1].astype(np.int64))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`: B windows as ids_BT to predict from, and the ids that follow each of them."""
        ids_BT1 = torch.stack([self.window(number) for number in numbers])
        return Batch({"ids_BT": ids_BT1[:, :-1], "sample_B": torch.tensor(list(numbers))}, ids_BT1[:, 1:])

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`: every token but a window's first is a target."""
        return len(numbers) * self.seq_len

    def target_entropy(self) -> float:
        """See `Samples`: the unigram entropy of the split."""
        counts = self._count()
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    def _count(self) -> np.ndarray:
        """How often each token is a target: int64 [vocabulary]."""
        counts = np.zeros(0, dtype=np.int64)
        for start in range(0, self.num_tokens, _COUNT_BLOCK):
            block = np.bincount(self.tokens[start : start + _COUNT_BLOCK], minlength=len(counts))
            block[: len(counts)] += counts
            counts = block
        return counts
