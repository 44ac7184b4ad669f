"""One hop: rows move among the ranks of one group, metered, with a deadline, and a name for every failure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from twohop.comm.diagnose import explain
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

    @classmethod
    def make(cls, topology: Topology, group: Any, label: str, meter: TrafficMeter | None) -> "Channel":
        """A channel over `group`, which must be one of the topology's. Makes no communication."""
        ranks = tuple(dist.get_process_group_ranks(group))
        levels = tuple(topology.traffic_level(peer) for peer in ranks)
        return cls(group, ranks, levels, topology, label, meter)

    @property
    def where(self) -> str:
        """This rank and layer, as errors begin."""
        return f"rank {self.topology.rank}" + (f", {self.label}" if self.label else "")

    @property
    def crosses_nodes(self) -> bool:
        """Whether any peer lives on another node."""
        return any(level.startswith("between") for level in self.levels)

    def start(
        self, rows: torch.Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], phase: str
    ) -> "Pending":
        """Begin to send `send_splits[p]` consecutive rows to each peer p. Every rank of the group must call this.

        Args:
            rows: [sum(send_splits), ...], any dtype that the backend moves, in order of the peers.
            send_splits, recv_splits: rows for, and from, each peer; the two sides must agree.
            phase: what the rows are for, in errors and on the meter.

        Raises:
            CommError: a peer died.
        """
        rows = rows.contiguous()
        received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
        try:
            work = dist.all_to_all_single(
                received, rows, list(recv_splits), list(send_splits), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise self.failure(phase, error) from error
        if self.meter is not None:
            row_bytes = rows.element_size() * rows[:1].numel() if len(rows) else 0
            for level, count in zip(self.levels, send_splits, strict=True):
                if level != "own rank" and count:
                    self.meter.record(level, phase, count * row_bytes, 1)
        return Pending(self, phase, work, rows, received)

    def exchange(
        self, rows: torch.Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], phase: str
    ) -> torch.Tensor:
        """`start` and wait: [sum(recv_splits), ...], what the peers sent, in order of the peers."""
        return self.start(rows, send_splits, recv_splits, phase).wait()

    def failure(self, phase: str, error: Exception) -> CommError:
        """The CommError for a transport error, with what the other ranks say of themselves."""
        reason = " ".join(str(error).split())
        message = f"{self.where}, {phase}: the exchange among ranks {list(self.ranks)} failed. "
        return CommError(message + explain(self.topology, f"{self.label}, {phase}") + f" (transport: {reason})")


@dataclass
class Pending:
    """An exchange under way; keeps the sent rows alive until it is over."""

    channel: Channel
    phase: str
    work: Any
    sent: torch.Tensor | None
    received: torch.Tensor

    def wait(self) -> torch.Tensor:
        """What the peers sent, or a CommError when one died or did not come within the group's deadline."""
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.channel.failure(self.phase, error) from error
        self.sent = None
        return self.received
