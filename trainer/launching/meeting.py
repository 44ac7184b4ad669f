"""How ranks find each other in a store that other ranks have used before them.

torch's elastic agent keeps one store while it starts workers again and again, and a key such as "rank 1's address" may
be that of a process which has died. The count of restarts in the environment does not tell them apart: agents of
several nodes count for themselves. So every start of the workers gets a name, which all of them provably share.
"""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from twohop.trainer.errors import UserError

POLL_S = 0.02


def meet(store: dist.Store, rank: int, num_ranks: int, patience: timedelta) -> dist.Store:
    """Wait until all ranks of this start have come; the part of the store that is theirs alone, the same on all.

    Rank 0 calls each rank by a name that only its process knows; what earlier processes have left never answers.

    Raises:
        UserError: some ranks have not come after `patience`; they are named.
    """
    name = uuid.uuid4().hex
    store.set(f"hello/{rank}", name)
    leader = name if rank == 0 else None
    try:
        if leader is not None:
            _gather(store, leader, num_ranks, patience)
            store.set(f"go/{leader}", "")
        else:
            store.wait([f"call/{name}"], patience)
            leader = store.get(f"call/{name}").decode()
            store.set(f"here/{leader}/{rank}", "")
            store.wait([f"go/{leader}"], patience)
    except dist.DistStoreError:
        absent = [0]  # whoever else is: nobody has called
        if leader is not None:
            absent = [peer for peer in range(1, num_ranks) if not store.check([f"here/{leader}/{peer}"])]
        raise UserError(
            f"ranks {absent} of {num_ranks} did not start within comm.init_timeout_s={patience.total_seconds():g}: "
            "look at their logs, or raise comm.init_timeout_s"
        ) from None
    return dist.PrefixStore(leader, store)


def _gather(store: dist.Store, leader: str, num_ranks: int, patience: timedelta) -> None:
    """As rank 0: call every rank, and again when a new process has taken its place, until all have answered."""
    deadline = time.monotonic() + patience.total_seconds()
    missing = set(range(1, num_ranks))
    called: dict[int, str] = {}  # the name by which each rank was called last
    while missing:
        for peer in list(missing):
            if store.check([f"here/{leader}/{peer}"]):
                missing.remove(peer)
            elif store.check([f"hello/{peer}"]):
                found = store.get(f"hello/{peer}").decode()
                if called.get(peer) != found:
                    store.set(f"call/{found}", leader)
                    called[peer] = found
        if missing and time.monotonic() > deadline:
            raise dist.DistStoreError
        if missing:
            time.sleep(POLL_S)
