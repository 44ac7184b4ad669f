"""Rows of experts move from slot to slot, across the ranks of an EP group."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from twohop.comm.topology import Topology


def move_rows(local: Tensor, before_E: Tensor, after_E: Tensor, topology: Topology) -> Tensor:
    """This rank's rows after each expert's row has gone from its slot in `before_E` to that in `after_E`.

    Every rank of the EP group must call this, with the same slots.

    Args:
        local: [E / ranks of the group, ...], the rows in this rank's slots; not changed. A DTensor is shared out along
            another dimension, in the same way on all ranks of the group.
        before_E: int64 on the host, the slot of each expert, a permutation.
        after_E: the same, as it shall be.
        topology: of the layer.

    Raises:
        RuntimeError: of the process group, when a rank died or did not come before its deadline.
    """
    if isinstance(local, DTensor):
        share = move_rows(local.to_local(), before_E, after_E, topology)
        return DTensor.from_local(share, local.device_mesh, local.placements, run_check=False)
    ranks, own, of_rank = topology.ep_size, topology.ep_rank, len(local)
    leaving_E, coming_E = before_E // of_rank == own, after_E // of_rank == own
    # Both sides go through the experts that one rank gives to another in order of their new slots.
    by_new_slot = after_E.argsort()
    sent = by_new_slot[leaving_E[by_new_slot]]
    received = by_new_slot[coming_E[by_new_slot]]
    received = received[(before_E[received] // of_rank).argsort(stable=True)]
    rows = local[(before_E[sent] - own * of_rank).to(local.device)].contiguous()
    if ranks > 1:
        arrived = torch.empty_like(rows)
        to_each = (after_E[sent] // of_rank).bincount(minlength=ranks).tolist()
        from_each = (before_E[received] // of_rank).bincount(minlength=ranks).tolist()
        dist.all_to_all_single(arrived, rows, from_each, to_each, group=topology.ep_group)
        rows = arrived
    moved = torch.empty_like(local)
    moved[(after_E[received] - own * of_rank).to(local.device)] = rows
    return moved
