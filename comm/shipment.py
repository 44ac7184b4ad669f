"""What a dispatch sends: the rows and assignments of each hop, chunk and peer. For simulations; imports no torch.

Either as expected for uniform routing, where all nodes are alike and one stands for all, or exactly, for given expert
ids of every rank. Written apart from the plan of a real dispatch (`twohop.comm.plan`), which tests compare it with.

Shapes: S ranks that are looked at, P peers of an exchange, C chunks, N tokens of a rank, K experts of a token,
E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twohop.comm.cost import Workload, distinct_subtrees
from twohop.comm.routes import ROUTES, Hop

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Peers:
    """Whom each rank that is looked at talks to in one exchange."""

    to_SP: Indices  # the peer, or the rank that stands for it, as an index into the ranks that are looked at
    crosses_SP: NDArray[np.bool_]  # the peer lives on another node
    others_SP: NDArray[np.bool_]  # it is not the rank itself
    own_S: Indices  # number of the rank among its peers
    turn_SP: Indices  # in which order a rank sends: node by node, beginning with itself, so that no two meet

    def back(self, rows_SP: Array) -> Array:
        """What goes to each peer on the way home, given what went to each on the way there."""
        home_SP = np.zeros_like(rows_SP)
        home_SP[self.to_SP, self.own_S[:, None]] = rows_SP
        return home_SP


@dataclass(frozen=True)
class Shipment:
    """One dispatch of an EP group of `block` = (nodes, ranks of each node), seen from the ranks that are looked at."""

    block: tuple[int, int]
    ranks_per_node: int  # of all EP groups that have ranks on a node
    nodes: int  # that are looked at: all, or one that stands for all
    hops: tuple[Hop, ...]
    peers: tuple[Peers, ...]  # of each hop
    rows_CSP: tuple[Array, ...]  # of each hop, on the way there
    assignments_SP: tuple[Array, ...]
    at_experts_CS: Array  # rows at the experts of each rank
    num_experts: int

    @property
    def chunks(self) -> int:
        """Parts of the tokens that travel one after the other."""
        return len(self.at_experts_CS)

    @property
    def numbers_of_counts(self) -> list[int]:
        """Integers in the message of counts to one peer, for each hop (`twohop.comm.counts`)."""
        ranks = math.prod(self.block)
        levels = sum(size > 1 for size in self.block)
        numbers = ranks * self.chunks * (self.num_experts // ranks + levels)
        return [4 + numbers // peers.to_SP.shape[1] for peers in self.peers]

    def home(self, hop: int) -> Array:
        """Rows of a hop on the way home, [C, S, P]. A node that stands for all sends home what it was sent."""
        if self.nodes < self.block[0]:
            return self.rows_CSP[hop]
        return np.stack([self.peers[hop].back(rows_SP) for rows_SP in self.rows_CSP[hop]])

    @classmethod
    def expected(
        cls, work: Workload, block: tuple[int, int], route: str, chunks: int = 1, ranks_per_node: int | None = None
    ) -> "Shipment":
        """For uniform routing: every rank sends its expected share to each peer, and one node is looked at."""
        local = block[1]
        ranks_per_node = ranks_per_node or local
        hops, axes = _hops(route, block)
        sizes = [("", block[axis]) for axis in axes]
        rows = [work.tokens * distinct_subtrees(work, sizes[: i + 1]) for i in range(len(sizes))]
        peers = tuple(
            _peers(block, ranks_per_node // local, [axes[i] for i in hop.exchange], alike=True) for hop in hops
        )
        depth, rows_CSP, assignments_SP = -1, [], []
        for hop, to in zip(hops, peers, strict=True):
            depth = max((depth, *hop.spread))
            shape = to.to_SP.shape
            rows_CSP.append(np.full((chunks, *shape), rows[depth] / chunks / shape[1]))
            assignments_SP.append(np.full(shape, work.tokens * work.top_k / shape[1]))
        at_experts_CS = np.full((chunks, ranks_per_node), work.tokens * work.top_k / chunks)
        return cls(
            block,
            ranks_per_node,
            1,
            hops,
            peers,
            tuple(rows_CSP),
            tuple(assignments_SP),
            at_experts_CS,
            work.num_experts,
        )

    @classmethod
    def exact(
        cls, ids: Sequence[NDArray[np.int64]], num_experts: int, block: tuple[int, int], route: str, chunks: int = 1
    ) -> "Shipment":
        """For given expert ids [N, K] of each rank; a negative one goes nowhere. The EP group is the whole world."""
        hops, axes = _hops(route, block)
        sizes = [block[axis] for axis in axes]
        peers = tuple(_peers(block, 1, [axes[i] for i in hop.exchange], alike=False) for hop in hops)
        source_n, token_n, chunk_n, expert_n = _assignments(ids, chunks)
        home_n = expert_n // (num_experts // math.prod(block))
        at_2n = [np.unravel_index(rank_n, sizes) if sizes else () for rank_n in (source_n, home_n)]
        depth, moved, rows_CSP, assignments_SP = -1, set[int](), [], []
        for hop, to in zip(hops, peers, strict=True):
            depth = max((depth, *hop.spread))
            holder = [at_2n[1 if axis in moved else 0][axis] for axis in range(len(sizes))]
            holder_n = np.ravel_multi_index(tuple(holder), sizes)
            exchanged = [sizes[axis] for axis in hop.exchange]
            peer_n = np.ravel_multi_index(tuple(at_2n[1][axis] for axis in hop.exchange), exchanged)
            subtree_n = home_n // math.prod(sizes[depth + 1 :])
            first_n = np.unique(np.stack([source_n, token_n, subtree_n]), axis=1, return_index=True)[1]
            rows = np.zeros((chunks, *to.to_SP.shape))
            np.add.at(rows, (chunk_n[first_n], holder_n[first_n], peer_n[first_n]), 1)
            assignments = np.zeros(to.to_SP.shape)
            np.add.at(assignments, (holder_n, peer_n), 1)
            rows_CSP.append(rows)
            assignments_SP.append(assignments)
            moved |= set(hop.exchange)
        at_experts_CS = np.zeros((chunks, math.prod(block)))
        np.add.at(at_experts_CS, (chunk_n, home_n), 1)
        return cls(
            block, block[1], block[0], hops, peers, tuple(rows_CSP), tuple(assignments_SP), at_experts_CS, num_experts
        )


def _hops(route: str, block: tuple[int, int]) -> tuple[tuple[Hop, ...], list[int]]:
    """A route's hops, and which of (nodes, local) its levels are: a level of one rank has nothing to exchange."""
    axes = [axis for axis in (0, 1) if block[axis] > 1]
    return tuple(ROUTES[route](len(axes)) if axes else ()), axes


def _peers(block: tuple[int, int], groups: int, axes: list[int], alike: bool) -> Peers:
    """Whom ranks talk to along `axes`; of `groups` EP groups that share nodes, and of one node if all are alike."""
    nodes, local = block
    node_S, group_S, local_S = (
        part.reshape(-1) for part in np.indices((1 if alike else nodes, groups, local), dtype=np.int64)
    )
    sizes = [block[axis] for axis in axes]
    coordinates = dict(zip(axes, np.indices(sizes, dtype=np.int64).reshape(len(axes), -1), strict=True))
    shape = (len(node_S), math.prod(sizes))
    node_SP = np.broadcast_to(coordinates.get(0, node_S[:, None]), shape)
    local_SP = np.broadcast_to(coordinates.get(1, local_S[:, None]), shape)
    own_S = np.ravel_multi_index(tuple((node_S, local_S)[axis] for axis in axes), sizes)
    node_to_SP = np.zeros_like(node_SP) if alike else node_SP
    crosses_SP = node_SP != node_S[:, None]
    return Peers(
        to_SP=(node_to_SP * groups + group_S[:, None]) * local + local_SP,
        crosses_SP=crosses_SP,
        others_SP=crosses_SP | (local_SP != local_S[:, None]),
        own_S=own_S,
        turn_SP=(node_SP - node_S[:, None]) % nodes * local + (local_SP - local_S[:, None]) % local,
    )


def _assignments(ids: Sequence[NDArray[np.int64]], chunks: int) -> tuple[Indices, Indices, Indices, Indices]:
    """Rank, token, chunk and expert of every assignment that goes anywhere."""
    parts = []
    for rank, ids_NK in enumerate(ids):
        token_n, slot_n = np.nonzero(ids_NK >= 0)
        bounds = [len(ids_NK) * c // chunks for c in range(1, chunks + 1)]
        chunk_n = np.searchsorted(bounds, token_n, side="right")
        parts.append((np.full_like(token_n, rank), token_n, chunk_n, ids_NK[token_n, slot_n]))
    source_n, token_n, chunk_n, expert_n = (np.concatenate(part) for part in zip(*parts, strict=True))
    return source_n, token_n, chunk_n, expert_n
