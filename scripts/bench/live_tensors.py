"""Which memory of this process's tensors is alive, moment by moment: every allocation, from torch.profiler."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.distributed.tensor import DTensor
from torch.profiler import profile, record_function

MARK = "live tensors of "
PAUSE_S = 3e-3


class LiveTensors:
    """What `recording` saw. Parts of memory are named by tensors that had their place in it at some moment."""

    def __init__(self) -> None:
        self.named: list[tuple[str, set[int]]] = []  # of each mark
        self.allocations: list[tuple[int, int, int]] = []  # (nanoseconds, address, bytes; negative: freed)
        self.marks: list[int] = []  # nanoseconds

    def name(self, part: str, tensors: Iterable[torch.Tensor]) -> None:
        """The memory that these tensors have now belongs to `part`."""
        with record_function(MARK + part):
            self.named.append((part, {_local(tensor).untyped_storage().data_ptr() for tensor in tensors}))

    def peak(self, since: int, until: int) -> dict[str, int]:
        """Bytes by part, those of none under "rest", when most was alive between the marks `since` and `until`."""
        part_of = self._parts()
        alive: dict[int, tuple[int, str]] = {}
        now: dict[str, int] = dict.fromkeys([part for part, _ in self.named], 0) | {"rest": 0}
        most = dict(now)
        for index, (moment, address, size) in enumerate(self.allocations):
            if address in alive:  # freed, if only by another thread, which is not seen; else it was there before
                freed, part = alive.pop(address)
                now[part] -= freed
            if size > 0:
                part = part_of.get(index, "rest")
                alive[address] = size, part
                now[part] += size
                if self.marks[since] <= moment <= self.marks[until] and sum(now.values()) > sum(most.values()):
                    most = dict(now)
        return most

    def _parts(self) -> dict[int, str]:
        """The part of each allocation that has one, by its index."""
        part_of: dict[int, str] = {}
        at: dict[int, int] = {}  # address -> the allocation that lives there
        marks = list(zip(self.marks, self.named, strict=True))
        for index, (moment, address, size) in enumerate([*self.allocations, (2**63, 0, 0)]):
            while marks and marks[0][0] <= moment:
                _, (part, addresses) = marks.pop(0)
                part_of |= {at[there]: part for there in addresses if there in at and at[there] not in part_of}
            if size > 0:
                at[address] = index
            else:
                at.pop(address, None)
        return part_of


@contextmanager
def recording() -> Iterator[LiveTensors]:
    """Record what this process's tensors on the CPU allocate and free inside; it can be asked afterwards.

    What other threads free is not seen. So after each wait for an exchange gloo's threads get a moment to let go of its
    tensors, that this one may be the last to hold them.
    """
    live, wait = LiveTensors(), dist.Work.wait

    def wait_a_little_longer(work: dist.Work, *timeout: Any) -> bool:
        done = wait(work, *timeout)
        time.sleep(PAUSE_S)
        return done

    with patch.object(dist.Work, "wait", wait_a_little_longer), profile(profile_memory=True) as profiler:
        yield live
    stack = [(event, False) for event in profiler.profiler.kineto_results.experimental_event_tree()]
    while stack:
        event, in_exchange = stack.pop()
        in_exchange = in_exchange or event.name.startswith(("c10d::", "gloo:"))
        stack.extend((child, in_exchange) for child in event.children)
        if event.tag == _EventType.Allocation and not in_exchange:
            fields = event.extra_fields
            live.allocations.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name.startswith(MARK):
            live.marks.append(event.start_time_ns)
    live.allocations.sort(key=lambda allocation: allocation[0])
    live.marks.sort()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
