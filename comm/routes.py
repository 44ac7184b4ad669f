"""Routes: in which hops a token's tree of destinations (nodes -> ranks -> experts) is walked.

A hop first spreads rows to their children on some levels, then exchanges them along some axes of the EP group's
grid; level and axis 0 are the outermost. A new algorithm is one function here and one line in `ROUTES`.
"""

from collections.abc import Callable
from typing import NamedTuple


class Hop(NamedTuple):
    """One hop of a route."""

    spread: tuple[int, ...]  # levels on which rows are copied to their children, before ...
    exchange: tuple[int, ...]  # ... they move along these axes


def flat(levels: int) -> list[Hop]:
    """One exchange among all ranks; a token is sent once to every rank that holds one of its experts."""
    everything = tuple(range(levels))
    return [Hop(everything, everything)]


def hierarchical(levels: int) -> list[Hop]:
    """Inside the node first, then outwards: few large messages, the same bytes (DeepSpeed-MoE and Tutel, 2022)."""
    everything = tuple(range(levels))
    return [Hop(everything if axis == levels - 1 else (), (axis,)) for axis in reversed(everything)]


def dedup(levels: int) -> list[Hop]:
    """Between nodes first, once for every node that holds one of a token's experts, then inside (DeepEP, 2025)."""
    return [Hop((axis,), (axis,)) for axis in range(levels)]


ROUTES: dict[str, Callable[[int], list[Hop]]] = {"flat": flat, "hierarchical": hierarchical, "dedup": dedup}
