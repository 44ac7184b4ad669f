"""Which rank each expert of a layer should live on, from tokens that were seen: their load, and who is chosen together.

Experts live in slots; slot s belongs to rank s // (experts of a rank) of the EP group. A placement is a permutation,
the slot of each expert. It changes nothing but where rows travel.

`contiguous` leaves every expert in the slot of its own number. `balanced` evens out the load of ranks. `affinity` puts
experts that are chosen for the same tokens on one node, so that `dedup` has fewer rows to send between nodes, and
evens out the load of ranks within each node; no node gets more than LOAD_SLACK of its share if that can be helped.

Imports no torch. Shapes: T tokens, K experts of a token, E experts, M nodes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Array = NDArray[np.float64]

KINDS = ("contiguous", "balanced", "affinity")
LOAD_SLACK = 1.1
ROUNDS, CANDIDATES = 10, 128  # of exchanges between nodes


@dataclass(frozen=True)
class Sample:
    """What tokens chose, and where they were."""

    ids_TK: Indices  # experts; a negative one goes nowhere
    node_T: Indices  # the token's own node, in the EP group
    num_experts: int

    def load(self) -> Array:
        """[E]: tokens of each expert."""
        return np.bincount(self.ids_TK[self.ids_TK >= 0], minlength=self.num_experts).astype(np.float64)

    def together(self) -> Array:
        """[E, E]: tokens of each pair of experts; 0 on the diagonal."""
        width = self.num_experts + 1  # the last is nowhere
        ids_TK = np.where(self.ids_TK >= 0, self.ids_TK, self.num_experts)
        pair_TKK = ids_TK[:, :, None] * width + ids_TK[:, None, :]
        counts_EE = np.bincount(pair_TKK.reshape(-1), minlength=width**2).reshape(width, width)[:-1, :-1]
        pairs_EE: Array = counts_EE.astype(np.float64)
        np.fill_diagonal(pairs_EE, 0)
        return pairs_EE


@dataclass(frozen=True)
class Quality:
    """What a placement does to a sample."""

    crossing_rows: float  # rows that a token sends to other nodes, in the mean
    rank_load: float  # largest load of a rank ÷ mean


def place(kind: str, load_E: Array, together_EE: Array, block: tuple[int, int]) -> Indices:
    """The slot of each expert, for an EP group of `block` = (nodes, ranks of each). Deterministic.

    Raises ValueError for a `kind` that there is not.
    """
    experts, (nodes, local) = len(load_E), block
    if kind == "contiguous":
        return np.arange(experts)
    if kind == "balanced":
        return _slots_of(_spread_evenly(load_E, nodes * local), experts // (nodes * local))
    if kind != "affinity":
        raise ValueError(f"placement {kind!r} is unknown: use one of {', '.join(KINDS)}")
    node_E = _gather_friends(load_E, together_EE, nodes)
    rank_E = np.empty(experts, dtype=np.int64)
    for node in range(nodes):
        members = np.flatnonzero(node_E == node)
        rank_E[members] = node * local + _spread_evenly(load_E[members], local)
    return _slots_of(rank_E, experts // (nodes * local))


def hottest(load_E: Array, count: int) -> list[int]:
    """The experts with the most load, ascending."""
    return sorted(np.argsort(-load_E, kind="stable")[:count].tolist())


def quality(
    sample: Sample, slots_E: Indices, block: tuple[int, int], shares: str = "node", shadowed: Sequence[int] = ()
) -> Quality:
    """Rows between nodes, and loads.

    Args:
        sample: tokens.
        slots_E: where experts live.
        block: (nodes, ranks of each) of the EP group.
        shares: which of a token's experts have one row in common: those of a "node" (dedup), of a "rank", or none but
            the "expert" itself.
        shadowed: experts whose tokens stay at home; all ranks are taken to have equally many.
    """
    ranks = math.prod(block)
    of_rank = sample.num_experts // ranks
    at_home_TK = np.isin(sample.ids_TK, list(shadowed))
    travels_TK = (sample.ids_TK >= 0) & ~at_home_TK
    rank_TK = np.where(travels_TK, slots_E[np.maximum(sample.ids_TK, 0)] // of_rank, -1)
    slots = {"node": of_rank * block[1], "rank": of_rank, "expert": 1}[shares]  # of one place
    place_TK = np.sort(np.where(travels_TK, slots_E[np.maximum(sample.ids_TK, 0)] // slots, -1), axis=1)
    new_TK = place_TK >= 0
    new_TK[:, 1:] &= place_TK[:, 1:] != place_TK[:, :-1]
    node_TK = place_TK * slots // (of_rank * block[1])
    crossing = (new_TK & (node_TK != sample.node_T[:, None])).sum()
    load = np.bincount(rank_TK[rank_TK >= 0], minlength=ranks) + at_home_TK.sum() / ranks
    return Quality(float(crossing / max(1, len(rank_TK))), float(load.max() / max(load.mean(), 1e-9)))


def _slots_of(rank_E: Indices, of_rank: int) -> Indices:
    """Experts of one rank keep their order."""
    slots_E = np.empty_like(rank_E)
    slots_E[np.argsort(rank_E, kind="stable")] = np.arange(len(rank_E))
    assert (slots_E // of_rank == rank_E).all()
    return slots_E


def _spread_evenly(load_E: Array, places: int) -> Indices:
    """The heaviest expert first, each to the place with the least load that has room; equally many to each place."""
    room, total = np.full(places, len(load_E) // places), np.zeros(places)
    place_E = np.empty(len(load_E), dtype=np.int64)
    for expert in np.argsort(-load_E, kind="stable"):
        place = int(np.argmin(np.where(room > 0, total, np.inf)))
        place_E[expert] = place
        total[place] += load_E[expert]
        room[place] -= 1
    return place_E


def _gather_friends(load_E: Array, together_EE: Array, nodes: int) -> Indices:
    """The node of each expert, from two beginnings that swaps improve: the lighter one, if one is too heavy."""
    ends = [
        _swap(node_E, load_E, together_EE, nodes)
        for node_E in (_spread_evenly(load_E, nodes), _grow(load_E, together_EE, nodes))
    ]
    limit = LOAD_SLACK * load_E.sum() / nodes

    def cost(node_E: Indices) -> tuple[float, float]:
        heaviest = np.bincount(node_E, load_E, minlength=nodes).max()
        return max(limit, heaviest), -together_EE[node_E[:, None] == node_E].sum()

    return min(ends, key=cost)


def _grow(load_E: Array, together_EE: Array, nodes: int) -> Indices:
    """One node after the other: begin with the heaviest expert left, add the best friend of those who are there."""
    of_node = len(load_E) // nodes
    node_E = np.full(len(load_E), -1)
    limit = LOAD_SLACK * load_E.sum() / nodes
    for node in range(nodes):
        friends_E, load = np.zeros(len(load_E)), 0.0
        for place in range(of_node):
            left_E = node_E < 0
            fits_E = left_E & (load + load_E <= limit)
            if fits_E.any():
                wanted_E = friends_E if place else load_E
                expert = int(np.argmax(np.where(fits_E, wanted_E, -np.inf)))
            else:
                expert = int(np.argmin(np.where(left_E, load_E, np.inf)))
            node_E[expert] = node
            friends_E += together_EE[expert]
            load += load_E[expert]
    return node_E


def _swap(node_E: Indices, load_E: Array, together_EE: Array, nodes: int) -> Indices:
    """Exchange two experts of different nodes while some exchange keeps more pairs together (Kernighan & Lin 1970).

    A node's load may not pass the limit, or, where it has, may not grow. All exchanges are weighed at once, the best
    of them one by one again, since each changes what others are worth.
    """
    node_E = node_E.copy()
    member_EM = np.eye(nodes)[node_E]
    load_M, friends_EM = load_E @ member_EM, together_EE @ member_EM
    limit = LOAD_SLACK * load_E.sum() / nodes

    def gain(e: int, f: int) -> float:
        """Pairs that come together when e and f change places; 0 if they may not."""
        a, b = node_E[e], node_E[f]
        heavier = load_E[e] - load_E[f]
        full = a if heavier < 0 else b
        if a == b or (heavier != 0 and load_M[full] + abs(heavier) > limit):
            return 0.0
        return float(friends_EM[e, b] - friends_EM[e, a] + friends_EM[f, a] - friends_EM[f, b] - 2 * together_EE[e, f])

    for _ in range(ROUNDS):
        leave_EE = friends_EM[:, node_E] - friends_EM[np.arange(len(node_E)), node_E][:, None]  # e's gain at f's node
        gain_EE = np.triu(leave_EE + leave_EE.T - 2 * together_EE)
        last = min(CANDIDATES, gain_EE.size)
        good_EE = (gain_EE > 0) & (gain_EE >= np.partition(gain_EE, -last, axis=None)[-last])
        best = np.flatnonzero(good_EE)
        best = best[np.argsort(-gain_EE.flat[best], kind="stable")][:CANDIDATES]
        swapped = False
        for e, f in zip(*np.unravel_index(best, gain_EE.shape), strict=True):
            if gain(e, f) <= 0:
                continue
            a, b = node_E[e], node_E[f]
            difference = together_EE[e] - together_EE[f]
            friends_EM[:, a] -= difference
            friends_EM[:, b] += difference
            load_M[a] += load_E[f] - load_E[e]
            load_M[b] += load_E[e] - load_E[f]
            node_E[e], node_E[f] = b, a
            swapped = True
        if not swapped:
            break
    return node_E
