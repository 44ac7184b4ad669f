"""A folder of safetensors: tensors by name, whatever file they are in, read a slice at a time."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twohop.models.interop.hf_config import InteropError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class TensorFolder:
    """The tensors of `model.safetensors`, or of all files that `model.safetensors.index.json` names."""

    def __init__(self, directory: Path) -> None:
        """Opens every file and reads the names in it.

        Raises:
            InteropError: no safetensors, a damaged file, or an index that does not name what the files hold.
        """
        self.directory = directory
        files, indexed = self._index()
        self._files = {file: self._open(file) for file in files}
        self._home = {name: handle for handle in self._files.values() for name in handle.keys()}  # noqa: SIM118
        if indexed is not None and (wrong := sorted(set(indexed) ^ set(self._home))):
            raise InteropError(f"{directory}: {INDEX_FILE} and the files disagree about tensor {wrong[0]}: get it anew")

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._home)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._home[name].get_slice(name).get_shape())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows start … stop of a tensor, on the CPU and in the file's dtype; the rest is not read."""
        return self._home[name].get_slice(name)[slice(start, stop)]

    def _index(self) -> tuple[list[str], dict[str, str] | None]:
        index = self.directory / INDEX_FILE
        if not index.is_file():
            if not (self.directory / SINGLE_FILE).is_file():
                raise InteropError(
                    f"{self.directory} holds neither {INDEX_FILE} nor {SINGLE_FILE}: pickled weights are not read, "
                    "save them with save_pretrained(..., safe_serialization=True)"
                )
            return [SINGLE_FILE], None
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            files = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InteropError(f"{index}: damaged ({error!r}): get it anew") from None
        if foreign := [file for file in files if Path(file).name != file]:
            raise InteropError(f"{index} names the file {foreign[0]}, which is outside its folder: get it anew")
        return files, weight_map

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.directory / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InteropError(f"{self.directory / file}: missing or damaged ({error}): get it anew") from None


def write_tensors(path: Path, tensors: Iterable[tuple[str, Tensor, torch.dtype]]) -> None:
    """One safetensors file of (name, tensor, type to write); tensors may be views of larger ones."""
    copies = {name: torch.empty(x.shape, dtype=dtype).copy_(x) for name, x, dtype in tensors}
    save_file(copies, path, metadata={"format": "pt"})


def write_index(directory: Path, files: dict[str, str], total_size: int) -> None:
    """`model.safetensors.index.json`: which file each tensor is in."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
