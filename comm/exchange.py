"""One hop: rows move among the ranks of one group, metered and with a deadline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from twohop.comm.errors import CommError
from twohop.comm.topology import Topology
from twohop.comm.traffic import TrafficMeter


@dataclass(frozen=True)
class Channel:
    """A group of ranks that exchange rows; peers are numbered as in the group, in world order."""

    group: Any  # ProcessGroup
    ranks: tuple[int, ...]  # world rank of each peer
    levels: tuple[str, ...]  # traffic level of each peer, "own rank" for this one
    where: str  # "rank 3, layer 5", for errors
    meter: TrafficMeter | None = None

    @classmethod
    def make(cls, topology: Topology, group: Any, label: str, meter: TrafficMeter | None) -> "Channel":
        """A channel over `group`, which must be one of the topology's. Makes no communication."""
        ranks = tuple(dist.get_process_group_ranks(group))
        levels = tuple(topology.traffic_level(peer) for peer in ranks)
        where = f"rank {topology.rank}" + (f", {label}" if label else "")
        return cls(group, ranks, levels, where, meter)

    def exchange(
        self, rows: torch.Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], phase: str
    ) -> torch.Tensor:
        """Send `send_splits[p]` consecutive rows to each peer p. Every rank of the group must call this.

        Args:
            rows: [sum(send_splits), ...], any dtype that the backend moves, in order of the peers.
            send_splits, recv_splits: rows for, and from, each peer; the two sides must agree.
            phase: what the rows are for, in errors and on the meter.

        Returns:
            [sum(recv_splits), ...]: what the peers sent, in order of the peers.

        Raises:
            CommError: a peer died or did not come within the group's deadline.
        """
        received = rows.new_empty((sum(recv_splits), *rows.shape[1:]))
        try:
            dist.all_to_all_single(received, rows.contiguous(), list(recv_splits), list(send_splits), group=self.group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CommError(
                f"{self.where}, {phase}: exchange among ranks {list(self.ranks)} failed: {reason}"
            ) from error
        if self.meter is not None:
            self._count(send_splits, rows[0:1].numel() * rows.element_size() if len(rows) else 0, phase)
        return received

    def _count(self, send_splits: Sequence[int], row_bytes: int, phase: str) -> None:
        assert self.meter is not None
        for level, rows in zip(self.levels, send_splits, strict=True):
            if level != "own rank" and rows:
                self.meter.record(level, phase, rows * row_bytes, 1)
