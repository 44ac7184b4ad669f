"""Weights between our models and files: every rank reads and writes its own experts only.

Shapes: E experts of the layer, F hidden width, D model width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from twohop.models.base import MoEModel
from twohop.models.build import expert_parameters
from twohop.models.init import assign
from twohop.models.interop.family import EXPERT, Family, Stored, matches
from twohop.models.interop.files import TensorFolder
from twohop.models.interop.hf_config import InteropError


class Written(NamedTuple):
    """A tensor for a file."""

    name: str
    tensor: Tensor  # may share memory with a parameter
    dtype: torch.dtype  # to be written in

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.dtype.itemsize


class Piece(NamedTuple):
    """A part of a parameter of this rank, and the tensor, or the rows of it, that hold the same."""

    name: str
    view: Tensor  # shares memory with the parameter
    shape: tuple[int, ...]  # of the whole tensor `name`
    start: int = 0  # the first of its rows
    rows: tuple[int, ...] | None = None  # see `Stored`


@torch.no_grad()
def load_weights(model: MoEModel, family: Family, folder: TensorFolder) -> None:
    """Fill the model, in its own dtype, from any of the layouts that the family's files have.

    Needs no other rank; under expert parallelism every rank calls it and reads its own experts.

    Raises:
        InteropError: a tensor is missing, misshapen, or belongs to nothing in the model; names it.
    """
    known: set[str] = set()
    found = _by_usual_name(family, folder)
    for stored, tensor, first_expert, num_experts in _own_tensors(model, family):
        # Of a tensor that an engine has shared out, the whole is read and this rank's part kept.
        target = torch.empty(tensor.shape, dtype=tensor.dtype) if isinstance(tensor, DTensor) else tensor
        whole = stored.whole is not None and stored.whole in found
        needed = {stored.whole} if whole and stored.whole else _all_names(stored, num_experts)
        if missing := sorted(needed - found.keys()):  # also those that other ranks read: so all say the same
            raise InteropError(f"{folder.directory} lacks the tensor {missing[0]}, which {stored.ours} needs")
        known |= needed
        for piece in _pieces(stored, target, first_expert, num_experts, whole):
            name = found[piece.name]
            if (shape := folder.shape(name)) != piece.shape:
                raise InteropError(
                    f"{folder.directory}: tensor {name} has the shape {list(shape)}, "
                    f"but config.json asks for {list(piece.shape)}"
                )
            rows = folder.read(name, piece.start, piece.start + len(piece.view) if whole else None)
            piece.view.copy_(rows if piece.rows is None else rows[torch.tensor(piece.rows)])
        if target is not tensor:
            assign(tensor, target)
    _refuse_unknown(family, model, folder, set(found) - known, found)


@torch.no_grad()
def own_weights(
    model: MoEModel, family: Family, rank: int, world_size: int, dtype: torch.dtype = torch.float32
) -> Iterator[Written]:
    """What this rank writes, so that all ranks together write everything once.

    Experts are written by the first of the ranks that hold them, other tensors by all ranks in turn. Every rank must
    draw all of it: what an engine has shared out is put together on the way.
    """
    experts = expert_parameters(model)
    for number, (stored, tensor, first_expert, num_experts) in enumerate(_own_tensors(model, family)):
        if stored.ours in experts:
            writes = experts[stored.ours].dispatcher.topology.edp_rank == 0
        else:
            writes = number % world_size == rank
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if writes:
            for piece in _pieces(stored, tensor, first_expert, num_experts, whole=False):
                yield Written(piece.name, _their_order(piece), torch.float32 if stored.exact else dtype)


def _own_tensors(model: MoEModel, family: Family) -> Iterator[tuple[Stored, Tensor, int, int]]:
    """Every tensor of the model with its place in files, first local expert and number of experts (0: no experts)."""
    state = dict(model.state_dict())
    experts = expert_parameters(model)
    for stored in family.tensors(model.config):
        layer = experts.get(stored.ours)
        first, count = (0, 0) if layer is None else (layer.dispatcher.first_expert, layer.dispatcher.num_experts)
        yield stored, state.pop(stored.ours), first, count
    # Buffers that are left count for training alone, such as what a capacity has learned of the load.
    if left := [name for name, _ in model.named_parameters() if name in state]:
        raise InteropError(f"{family.model_type} has no place for the parameter {left[0]} of this model")


def _pieces(stored: Stored, tensor: Tensor, first_expert: int, num_experts: int, whole: bool) -> Iterator[Piece]:
    """How one of this rank's tensors lies in files; `num_experts` is 0 unless it holds experts [E_local, …]."""
    if whole:
        assert stored.whole is not None
        yield Piece(stored.whole, tensor, (num_experts, *tensor.shape[1:]), first_expert)
        return
    matrices = enumerate(tensor, first_expert) if num_experts else [(0, tensor)]
    for expert, matrix in matrices:
        for name, part in zip(stored.names, matrix.chunk(len(stored.names)), strict=True):
            yield Piece(name.replace(EXPERT, str(expert)), part, tuple(part.shape), rows=stored.rows)


def _all_names(stored: Stored, num_experts: int) -> set[str]:
    """Names for the experts of all ranks."""
    return {name.replace(EXPERT, str(expert)) for name in stored.names for expert in range(max(1, num_experts))}


def _their_order(piece: Piece) -> Tensor:
    if piece.rows is None:
        return piece.view
    theirs = torch.empty_like(piece.view)
    theirs[torch.tensor(piece.rows, device=theirs.device)] = piece.view
    return theirs


def _by_usual_name(family: Family, folder: TensorFolder) -> dict[str, str]:
    """Names in the folder by those that the family's files usually have."""
    found: dict[str, str] = {}
    for name in sorted(folder.names):
        usual = name
        for alias, instead in family.aliases.items():
            usual = usual.replace(alias, instead)
        if usual in found:
            raise InteropError(f"{folder.directory}: tensors {found[usual]} and {name} are two names of the same")
        found[usual] = name
    return found


def _refuse_unknown(
    family: Family, model: MoEModel, folder: TensorFolder, unknown: set[str], found: dict[str, str]
) -> None:
    extra = sorted(name for name in unknown if not matches(family.superfluous(model.config), name))
    if extra:
        raise InteropError(
            f"{folder.directory}: tensor {found[extra[0]]} has no place in a {family.model_type} model of this "
            f"config.json{f' ({len(extra)} such tensors)' if len(extra) > 1 else ''}"
        )
