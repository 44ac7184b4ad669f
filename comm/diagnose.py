"""After a failure: every rank that still runs says where it is, so that the ones that do not are named.

Costs nothing until something fails. The transport's own message names an address at best; a rank that hangs sends
none at all. Words go through the key-value store of the rendezvous, which needs no cooperation of the network
between the ranks.
"""

import contextlib
import time
from datetime import timedelta

from torch.distributed import distributed_c10d

from twohop.comm.topology import Topology

ROLL_CALL_S = 2.0  # how long to wait for the words of the others
_KEY = "twohop/last-words/{rank}"


def last_words(topology: Topology, words: str) -> None:
    """Tell the other ranks why this one stops, e.g. an exception inside an expert. Never raises."""
    # The store's host may be gone; then the others are on their own as well.
    with contextlib.suppress(RuntimeError, ValueError):
        # The public API has no way to the store that the rendezvous made.
        distributed_c10d._get_default_store().set(_KEY.format(rank=topology.rank), words)


def explain(topology: Topology, where: str) -> str:
    """One sentence on the ranks of the EP group that are silent or that speak of something else."""
    if topology.world_size == 1:
        return ""
    last_words(topology, where)
    said: dict[int, str] = {}
    deadline = time.monotonic() + ROLL_CALL_S
    others = [rank for rank in topology.ep_ranks if rank != topology.rank]
    for rank in others:
        left = max(0.01, deadline - time.monotonic())
        try:
            store = distributed_c10d._get_default_store()
            store.wait([_KEY.format(rank=rank)], timedelta(seconds=left))
            said[rank] = store.get(_KEY.format(rank=rank)).decode()
        except (RuntimeError, ValueError):
            continue
    silent = [rank for rank in others if rank not in said]
    elsewhere = [f"rank {rank} was at {words}" for rank, words in said.items() if words != where]
    parts = [f"No word from ranks {silent}: dead, stopped, cut off or busy elsewhere."] if silent else []
    parts += ["; ".join(elsewhere) + "."] if elsewhere else []
    return " ".join(parts) or "All ranks were at the same place, so a link between them is at fault."
