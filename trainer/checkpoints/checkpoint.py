"""Checkpoints that any number of ranks and any EP size can save and any other can load.

`checkpoints/step-00000100/` holds the tensors as torch.distributed.checkpoint writes them and `manifest.json` with
the step, what the run is made of, and size and SHA-256 of every file. A checkpoint is written beside and renamed,
so that a folder with this name is whole; it is verified before anything is read from it. The generator of random
numbers is not in it: each micro-batch is seeded by (seed, step, index), so the step restores it.
"""

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from twohop.trainer.config import default_of
from twohop.trainer.data.tokens import sha256
from twohop.trainer.errors import CheckpointError
from twohop.trainer.world import gather_objects, rank, world_size

MANIFEST_FILE = "manifest.json"
METADATA_FILE = ".metadata"


@dataclass(frozen=True)
class Checkpoint:
    """The manifest of a checkpoint, and where it lies."""

    path: Path
    step: int  # training steps done, which is also the position in the data and in the schedule
    identity: dict[str, Any]  # what must be equal in the run that loads it: {config key: value}
    tracker_id: str
    files: dict[str, list]  # name -> [bytes, SHA-256]


class CheckpointStore:
    """The checkpoints of one run folder. Every rank of the world must call every method."""

    def __init__(
        self, directory: Path, keep: int = 1, log: Callable[[str], None] = print, keep_every: int | None = None
    ) -> None:
        self.directory = directory
        self.keep = keep
        self.keep_every = keep_every
        self.log = log

    def save(
        self,
        step: int,
        state: dict[str, Tensor],
        identity: dict[str, Any],
        tracker_id: str,
        group: dist.ProcessGroup | None = None,
    ) -> Checkpoint:
        """Write `state` as the checkpoint of `step`, then delete all but the newest `keep` and every `keep_every`th.

        A `group` of all ranks carries what they tell each other, if other messages may be on their way in the world's.

        Raises:
            CheckpointError: a file cannot be written, for one on a full disk; earlier checkpoints are untouched.
        """
        final = self.directory / f"step-{step:08d}"
        unfinished = self.directory / f".unfinished-{final.name}"

        def finish(files: dict[str, list]) -> None:
            checkpoint = Checkpoint(final, step, identity, tracker_id, files)
            _write_manifest(unfinished, checkpoint)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.rename(final)
            _sync(self.directory)
            # Later ones were damaged, or this run would have continued from them.
            later = [path for path in self._found() if path.name > final.name]
            older = self._found()[len(later) + self.keep :]
            for path in later + [path for path in older if not self._is_milestone(path)]:
                shutil.rmtree(path)

        try:
            together(lambda: _make_empty(unfinished), only_rank_0=True, group=group)
            _write_tensors(state, unfinished, group)
            hashed = together(lambda: _checksums(unfinished, _share(os.listdir(unfinished))), group=group)
            files = {name: entry for part in hashed for name, entry in part.items()}
            together(lambda: finish(files), only_rank_0=True, group=group)
        except CheckpointError as error:
            together(lambda: shutil.rmtree(unfinished, ignore_errors=True), only_rank_0=True, group=group)
            earlier = gather_objects(self._found(), group)[0]
            kept = f"the earlier checkpoint {earlier[0]} is whole" if earlier else "there is no earlier checkpoint"
            raise CheckpointError(f"cannot write {final}: {error}; {kept}") from None
        return Checkpoint(final, step, identity, tracker_id, files)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files are as they were written; None if there is none at all.

        Raises:
            CheckpointError: there are some, but all are damaged.
        """
        found = gather_objects(self._found())[0]
        for path in found:
            try:
                return _verified(path)
            except CheckpointError as error:
                self.log(f"checkpoint {path} is damaged ({error}): trying the one before it")
        if found:
            raise CheckpointError(f"{self.directory}: every checkpoint is damaged; start a new run")
        return None

    def _found(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), reverse=True)

    def _is_milestone(self, path: Path) -> bool:
        return self.keep_every is not None and int(path.name.removeprefix("step-")) % self.keep_every == 0


def load_tensors(checkpoint: Checkpoint, state: dict[str, Tensor], identity: dict[str, Any]) -> None:
    """Fill the tensors of `state` in place, whatever the layout they were saved from. Every rank must call this.

    `state` may be a part of the checkpoint, e.g. the model without the optimizer, and `identity` likewise. A key that
    the checkpoint does not know, because it is older than the key, counts as its default.

    Raises:
        CheckpointError: the checkpoint belongs to another model or run; names the first key that differs.
    """
    for key, ours in identity.items():
        theirs = _recorded(checkpoint.identity, key)
        if theirs != ours:
            raise CheckpointError(
                f"{checkpoint.path} was made with {key}={theirs}, but this run has {key}={ours}: "
                "use the same settings, or start a new run"
            )
    reader = dcp.FileSystemReader(checkpoint.path)
    try:
        _quietly(dcp.load, state, storage_reader=reader)
    except (CheckpointException, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path} does not hold this run's tensors: {error}") from error


def _recorded(identity: dict[str, Any], key: str) -> Any:
    """The value of a key in a checkpoint; one that the configuration has got since then had its default."""
    groups = [key[:end] for end, sign in enumerate(key) if sign == "."]
    if key in identity or any(group in identity for group in groups):  # a group that is null there is a key
        return identity.get(key)
    return default_of(key)


class _Writer(dcp.FileSystemWriter):
    """Reports why the file system refused a file: torch's own error only says that a position is unexpected."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException = error
            while deeper := cause.__cause__ or cause.__context__:
                cause = deeper
            raise cause from error


def _write_tensors(state: dict[str, Tensor], directory: Path, group: dist.ProcessGroup | None) -> None:
    try:
        _quietly(dcp.save, state, storage_writer=_Writer(directory), process_group=group)
    except CheckpointException as error:
        first, (cause, _) = min(error.failures.items())
        raise CheckpointError(f"rank {first}: {_reason(cause)}") from error


def _verified(path: Path) -> Checkpoint:
    """The checkpoint at `path`, after each rank has checked its share of the files."""

    def verify() -> Checkpoint:
        try:
            checkpoint = Checkpoint(path=path, **json.loads((path / MANIFEST_FILE).read_text()))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{MANIFEST_FILE}: {error}") from None
        for name in _share(checkpoint.files):
            if not (path / name).is_file():
                raise CheckpointError(f"{name} is missing")
            if _checksums(path, [name])[name] != checkpoint.files[name]:
                raise CheckpointError(f"{name} is not what was written")
        with (path / METADATA_FILE).open("rb") as file:
            _MetadataUnpickler(file).load()
        return checkpoint

    return together(verify)[0]


class _MetadataUnpickler(pickle.Unpickler):
    """torch.distributed.checkpoint pickles its table of contents; this refuses anything that is not part of one."""

    ALLOWED = frozenset(
        {("pathlib", "PosixPath"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
        | {("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
        | {
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in self.ALLOWED:
            raise CheckpointError(f"{METADATA_FILE} refers to {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def together(action: Callable[[], Any], only_rank_0: bool = False, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run `action` on every rank, or on rank 0 alone; all ranks get all results, or raise the first error.

    An OSError of any rank is a CheckpointError on all. Every rank must call this; see `gather_objects` for `group`.
    """
    result, problem = None, None
    if rank() == 0 or not only_rank_0:
        try:
            result = action()
        except (OSError, CheckpointError) as error:
            problem = _reason(error)
    outcomes = gather_objects((result, problem), group)
    for _, problem in outcomes:
        if problem is not None:
            raise CheckpointError(problem)
    return [result for result, _ in outcomes]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}; free some space, or lower checkpoint.keep"
    return str(error)


def _share(names: Iterable[str]) -> list[str]:
    """This rank's part of names that are the same on all ranks."""
    return sorted(names)[rank() :: world_size()]


def _checksums(directory: Path, names: Iterable[str]) -> dict[str, list]:
    return {name: [(directory / name).stat().st_size, sha256(directory / name)] for name in names}


def _write_manifest(directory: Path, checkpoint: Checkpoint) -> None:
    manifest = asdict(checkpoint)
    del manifest["path"]
    with (directory / MANIFEST_FILE).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    _sync(directory)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _sync(directory: Path) -> None:
    """A renamed entry survives a power failure only once its folder is on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """torch warns about every checkpoint in a world of one process, which is nothing to warn about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        call(*args, no_dist=world_size() == 1, **kwargs)
