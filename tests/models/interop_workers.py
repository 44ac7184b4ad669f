"""What ranks do in the tests of interop: a module of its own, because importing transformers costs seconds."""

from pathlib import Path

import torch
import torch.distributed as dist

from twohop.comm import Topology, build_dispatcher
from twohop.models import MoEModel, build_model
from twohop.models.interop import TensorFolder, fit_family, read_folder
from twohop.models.interop.transfer import load_weights, own_weights


def load(directory: Path, ep_size: int | None = None, reads: list | None = None) -> MoEModel:
    """The model of a folder; over an EP group of the world if `ep_size` is given. `reads` gets the names read."""
    family, config = read_folder(directory)
    make = None
    if ep_size is not None:
        topology = Topology.discover(ranks_per_node=2, ep_size=ep_size)
        make = lambda i, experts: build_dispatcher("dedup", topology, experts)  # noqa: E731
    model = build_model(config, make)
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan)  # what is not loaded shows
    folder = TensorFolder(directory)
    if reads is not None:
        read = folder.read
        folder.read = lambda name, *rows: reads.append((name, rows)) or read(name, *rows)
    load_weights(model, family, folder)
    return model.eval()


def logits_of(model: MoEModel, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids_BT).logits


def load_and_write(directory: Path, ids_BT: torch.Tensor, ep_size: int) -> tuple[torch.Tensor, list, dict]:
    """Logits of a loaded model, what this rank has read, and what it would write."""
    reads: list = []
    model = load(directory, ep_size, reads)
    family, _ = fit_family(model.config)
    written = {name: x.clone() for name, x, _ in own_weights(model, family, dist.get_rank(), dist.get_world_size())}
    return logits_of(model, ids_BT), reads, written
