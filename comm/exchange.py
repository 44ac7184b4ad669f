"""One hop: rows move among the ranks of one group, metered, with a deadline, and a name for every failure.

gloo ends a process, past any exception, when a message is larger than the room that waits for it. So sizes come
from counts on which all ranks have agreed, and beyond that every message bears a tag made of its layer, phase and
size: what a rank sends that has lost its way, because it skipped a combine or the backward of a layer, meets no
receive of another kind. Its peers then wait until the deadline, and learn from the roll call where it is. NCCL
knows no tags, and its errors end the process by its own watchdog.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from twohop.comm.clock import EXPOSED, PhaseClock
from twohop.comm.diagnose import give_up
from twohop.comm.errors import CommError
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter


@dataclass(frozen=True)
class Channel:
    """A group of ranks that exchange rows; peers are numbered as in the group, in world order."""

    group: Any  # ProcessGroup
    ranks: tuple[int, ...]  # world rank of each peer
    levels: tuple[str, ...]  # traffic level of each peer, "own rank" for this one
    topology: Topology
    label: str  # the layer, for errors
    meter: TrafficMeter | None = None
    algorithm: str = ""  # for errors: ranks that take different ways wait in different groups
    clock: PhaseClock = field(default_factory=PhaseClock)  # of the waits
    abandoned: "list[Pending]" = field(default_factory=list)  # nobody waits for these, but their memory is in use

    @classmethod
    def make(
        cls,
        topology: Topology,
        group: Any,
        label: str,
        meter: TrafficMeter | None,
        algorithm: str = "",
        clock: PhaseClock | None = None,
    ) -> "Channel":
        """A channel over `group`, which must be one of the topology's. Makes no communication."""
        ranks = tuple(dist.get_process_group_ranks(group))
        levels = tuple(topology.traffic_level(peer) for peer in ranks)
        return cls(group, ranks, levels, topology, label, meter, algorithm, clock or PhaseClock())

    @property
    def where(self) -> str:
        """This rank and layer, as errors begin."""
        return f"rank {self.topology.rank}" + (f", {self.label}" if self.label else "")

    def place(self, *phase: str) -> str:
        """Where this rank is, as the others read it in their errors."""
        return ", ".join(part for part in (self.label, *phase) if part)

    @property
    def crosses_nodes(self) -> bool:
        """Whether any peer lives on another node."""
        return any(level.startswith("between") for level in self.levels)

    def start(
        self,
        rows: torch.Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        phase: str,
        room: int | None = None,
    ) -> "Pending":
        """Begin to send `send_splits[p]` consecutive rows to each peer p. Every rank of the group must call this.

        Args:
            rows: [sum(send_splits), ...], any dtype that the backend moves, in order of the peers.
            send_splits, recv_splits: rows for, and from, each peer; the two sides must agree.
            phase: what the rows are for, in errors and on the meter.
            room: rows that each of `recv_splits` may hold though fewer come; ranks with equal room, at any layer,
                can then hear each other. gloo only.

        Raises:
            CommError: a peer died, or this topology has failed before.
        """
        board = self.topology.board
        if board is not None and board.over:
            raise CommError(f"{self.where}, {phase}: this topology has failed before; discover a new one to go on")
        while self.abandoned:
            self.abandoned.pop().wait()
        rows = rows.contiguous()
        received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
        sent, came = rows.split(list(send_splits)), received.split(list(recv_splits))
        try:
            if dist.get_backend(self.group) == "gloo":
                works = self._start_pairwise(sent, came, phase, room)
            else:
                splits = (list(recv_splits), list(send_splits))
                works = [dist.all_to_all_single(received, rows, *splits, group=self.group, async_op=True)]
        except RuntimeError as error:
            raise self.failure(phase, error) from error
        if self.meter is not None:
            row_bytes = rows.element_size() * rows[:1].numel() if len(rows) else 0
            for level, count in zip(self.levels, send_splits, strict=True):
                if level != "own rank" and count:
                    self.meter.record(level, phase, count * row_bytes, 1)
        return Pending(self, phase, works, rows, received)

    def _start_pairwise(
        self, sent: Sequence[torch.Tensor], came: Sequence[torch.Tensor], phase: str, room: int | None
    ) -> list[Any]:
        """Post receives before sends.

        Gloo's own all-to-all posts its sends first, and then two ranks take turns on their connection instead of
        using both directions of the link at once.
        """

        def tag(block: torch.Tensor) -> int:
            kind = f"{phase} {room}" if room else f"{self.label} {phase} {block.numel() * block.element_size()}"
            return zlib.crc32(kind.encode()) >> 1

        works = []
        for rank, block in zip(self.ranks, came, strict=True):
            if rank != self.topology.rank and block.numel():
                works.append(dist.irecv(block, rank, self.group, tag(block)))
        for rank, block, arrival in zip(self.ranks, sent, came, strict=True):
            if rank == self.topology.rank:
                arrival.copy_(block)
            elif block.numel():
                works.append(dist.isend(block, rank, self.group, tag(block)))
        return works

    def failure(self, phase: str, error: Exception) -> CommError:
        """The CommError for a transport error, with what the other ranks say of themselves."""
        reason = " ".join(str(error).split())
        heard = give_up(self.topology, self.place(phase, self.algorithm))
        heard = heard or "All ranks came to it, so a link between them is at fault."
        return CommError(
            f"{self.where}, {phase}: the exchange among ranks {list(self.ranks)} failed. {heard} (transport: {reason})"
        )


@dataclass
class Pending:
    """An exchange under way; keeps the sent rows alive until it is over."""

    channel: Channel
    phase: str
    works: list[Any]
    sent: torch.Tensor | None
    received: torch.Tensor

    def abandon(self) -> None:
        """Leave the exchange to itself; the channel keeps its memory until its next exchange."""
        self.channel.abandoned.append(self)

    def wait(self) -> torch.Tensor:
        """What the peers sent, or a CommError when one died, failed or did not come within the group's deadline."""
        with self.channel.clock.phase(EXPOSED, self.channel.place(self.phase)):
            try:
                for work in self.works:
                    work.wait()
            except RuntimeError as error:
                raise self.channel.failure(self.phase, error) from error
        self.sent = None
        return self.received
