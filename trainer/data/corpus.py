"""Text on disk: which files belong to a corpus, and which of them train and which validate.

A corpus is found again exactly on any machine that has the same files: their order and their split are
functions of relative paths and contents, never of the order in which a file system lists them.
"""

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple, Protocol

from twohop.trainer.config import DataConfig
from twohop.trainer.errors import DataError

_BLOCK = 4 << 20  # bytes read at once: bounds the memory that one huge file takes
_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


class Document(Protocol):
    """A text of a corpus."""

    @property
    def name(self) -> str:
        """What tells it from the others of its corpus, on any machine."""
        ...

    def blocks(self) -> Iterator[str]:
        """The text in parts, which are held in memory one at a time."""
        ...


class Documents(Sized, Iterable[Document], Protocol):
    """Documents in a fixed order, which can be read more than once."""


class TextFile(NamedTuple):
    """A file, its name inside the corpus and its size in bytes."""

    path: Path
    name: str
    size: int


@dataclass(frozen=True)
class FilePart:
    """A `Document`: the bytes [start, stop) of a UTF-8 file; both ends lie between characters."""

    path: Path
    name: str
    start: int
    stop: int

    def blocks(self) -> Iterator[str]:
        """The text, some MiB at a time.

        Raises:
            DataError: the file cannot be read or is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        position = self.start
        try:
            with self.path.open("rb") as file:
                file.seek(position)
                while position < self.stop:
                    raw = file.read(min(_BLOCK, self.stop - position))
                    if not raw:
                        raise DataError(f"{self.path}: the file became shorter while it was read; run again")
                    pending = len(decoder.getstate()[0])
                    yield decoder.decode(raw, final=position + len(raw) == self.stop)
                    position += len(raw)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: not UTF-8 text (byte {position - pending + error.start}); "
                "convert the file or leave it out of data.files"
            ) from None
        except OSError as error:
            raise _unreadable(self.path, error) from None


@dataclass(frozen=True)
class Corpus:
    """Documents for training and validation."""

    name: str
    train: Documents
    valid: Documents

    def fingerprint(self) -> str:
        """SHA-256 over the split, the names and the contents of all documents; reads and checks every byte."""
        total = hashlib.sha256()
        for split, documents in (("train", self.train), ("valid", self.valid)):
            for document in documents:
                content = hashlib.sha256()
                for block in document.blocks():
                    content.update(block.encode())
                total.update(f"{split}\0{document.name}\0{content.hexdigest()}\n".encode())
        return total.hexdigest()


def stdlib_corpus(config: DataConfig) -> Corpus:
    """The sources of the running Python's standard library, without tests and generated tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        TextFile(path, path.relative_to(root).as_posix(), path.stat().st_size)
        for path in root.rglob("*.py")
        if _NOT_SOURCE.isdisjoint(path.relative_to(root).parts) and _is_written_by_hand(path)
    ]
    if len(files) < 2:
        raise DataError(f"data.source=stdlib: {root} holds no Python sources; use data=text data.files=[…]")
    return _split("stdlib", files, config)


def text_corpus(config: DataConfig) -> Corpus:
    """The files, folders and globs of `data.files`; a single file is split by bytes.

    Raises:
        DataError: an entry is missing, or a file is empty or unreadable.
    """
    if not config.files:
        raise DataError("data.files is empty: name text files, folders or globs, for example data.files=[notes.txt]")
    paths = sorted({path.absolute() for entry in config.files for path in expand(entry)})
    parents = os.path.commonpath([path.parent for path in paths])
    files = [TextFile(path, path.relative_to(parents).as_posix(), _text_size(path)) for path in paths]
    return _split("text", files, config)


def _is_written_by_hand(path: Path) -> bool:
    if path.name.startswith("_sysconfigdata") or path.name == "sitecustomize.py" or not path.is_file():
        return False
    head = path.read_bytes()[:400]
    return bool(head) and b"gencodec.py" not in head  # the code pages in encodings/


def expand(entry: str) -> list[Path]:
    """The files that an entry of `data.files` names: itself, those in the folder, or those that the glob matches."""
    path = Path(entry).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path))]
    elif not path.exists() and has_magic(entry):
        found = [Path(p) for p in glob(str(path), recursive=True) if os.path.isfile(p)]
    else:
        found = [path] if path.is_file() else []
    if not found:
        what = "holds no file" if path.is_dir() else "no such file, folder or match"
        raise DataError(f"data.files: {entry}: {what}; correct the path")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size == 0:
        raise DataError(f"{path}: the file is empty; fill it or leave it out of data.files")
    return size


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); make it readable or leave it out of data.files")


def _split(name: str, files: list[TextFile], config: DataConfig) -> Corpus:
    """Split by file, or one file by bytes, after `data.max_mib` has chosen which files take part."""
    documents = _limit(files, config.max_mib)
    if not documents:
        raise DataError(f"data.max_mib={config.max_mib}: less than one character of text; raise it")
    if len(documents) == 1:
        return Corpus(name, *_split_bytes(documents[0], config.valid_fraction))
    # Independent of the order in `_limit`, so that a limit does not change the share of the validation split.
    place = {document: unit_hash("split", document.name) for document in documents}
    in_order = sorted(documents, key=lambda document: (place[document], document.name))
    wanted = sum(place[document] < config.valid_fraction for document in documents)
    count = min(max(wanted, 1), len(documents) - 1)  # either split has at least one file
    valid = set(in_order[:count])
    documents.sort(key=lambda document: document.name)
    return Corpus(name, [d for d in documents if d not in valid], [d for d in documents if d in valid])


def _limit(files: list[TextFile], max_mib: float | None) -> list[FilePart]:
    """A sample of at most `max_mib`: whole files in the order of a hash, the last one cut."""
    left = sum(file.size for file in files) if max_mib is None else int(max_mib * 2**20)
    chosen = []
    for file in sorted(files, key=lambda file: (unit_hash("order", file.name), file.name)):
        stop = file.size if file.size <= left else _character_start(file.path, left)
        if stop > 0:
            chosen.append(FilePart(file.path, file.name, 0, stop))
        left -= file.size
        if left <= 0:
            break
    return chosen


def _split_bytes(document: FilePart, valid_fraction: float) -> tuple[list[FilePart], list[FilePart]]:
    """The first part of one file trains, its end validates."""
    cut = _character_start(document.path, round(document.stop * (1 - valid_fraction)))
    if cut in (0, document.stop):
        raise DataError(f"{document.path}: too short to be split; add text or raise data.valid_fraction")
    parts = [FilePart(document.path, document.name, *span) for span in ((0, cut), (cut, document.stop))]
    return parts[:1], parts[1:]


def _character_start(path: Path, position: int) -> int:
    """The last position <= `position` at which a UTF-8 character of the file starts."""
    try:
        with path.open("rb") as file:
            file.seek(max(position - 3, 0))
            tail = file.read(min(position, 3) + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    back = 0
    while back < min(position, 3) and tail[-1 - back] & 0xC0 == 0x80:  # a continuation byte
        back += 1
    return position - back


def unit_hash(salt: str, name: str) -> float:
    """A number in [0, 1) that depends on nothing but the two strings."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:6], "big") / 2**48
