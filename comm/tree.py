"""Spread a row to its children, and sum the children back: the two local operations of dispatch and combine."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Bag:
    """The children of every parent, in the order in which they are summed."""

    children_C: torch.Tensor  # position of each child among the rows to sum, grouped by parent
    offsets: torch.Tensor  # [parents + 1]: the children of parent p are children_C[offsets[p]:offsets[p + 1]]

    @classmethod
    def from_parents(cls, parent_C: torch.Tensor, children_C: torch.Tensor, num_parents: int) -> "Bag":
        """`parent_C` [children] is non-decreasing and belongs to `children_C`, element by element."""
        counts = torch.zeros(num_parents, dtype=torch.long, device=parent_C.device)
        counts.scatter_add_(0, parent_C, torch.ones_like(parent_C))
        return cls(children_C, F.pad(counts.cumsum(0), (1, 0)))

    def part(self, parents: tuple[int, int], children: tuple[int, int]) -> "Bag":
        """The bag of some consecutive parents, whose children stand together at the given span of rows."""
        (first, last), (start, end) = parents, children
        return Bag(self.children_C[start:end] - start, self.offsets[first : last + 1] - start)

    def sum(self, rows_CD: torch.Tensor, weights_C: torch.Tensor | None = None) -> torch.Tensor:
        """[parents, D]: every parent's children added up one after the other; a parent without children is 0.

        The order of additions is a function of the bag alone, never of where the rows stand, which is what makes
        all dispatch algorithms agree to the bit. Weights multiply the children, in order of `children_C`.
        Half-precision rows are added up in fp32 and rounded once for each parent.
        """
        if len(rows_CD) == 0:
            return rows_CD.new_zeros(len(self.offsets) - 1, *rows_CD.shape[1:])
        wide = torch.promote_types(rows_CD.dtype, torch.float32)
        weights_C = None if weights_C is None else weights_C.to(wide)
        summed = F.embedding_bag(
            self.children_C,
            rows_CD.to(wide),
            self.offsets,
            mode="sum",
            per_sample_weights=weights_C,
            include_last_offset=True,
        )
        return summed.to(rows_CD.dtype)


@dataclass(frozen=True)
class Spread:
    """Copies rows to children, in sending order; its transpose sums the children, level by level."""

    gather_C: torch.Tensor  # row to copy for each child
    bags: tuple[Bag, ...]  # innermost level first

    def down(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """[children, D]: the copies."""
        return rows_RD.index_select(0, self.gather_C)

    def up(self, rows_CD: torch.Tensor, weights_C: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, D]: the sums. Weights, if any, belong to the innermost children in order of their bag."""
        for bag in self.bags:
            rows_CD = bag.sum(rows_CD, weights_C)
            weights_C = None
        return rows_CD


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    positions = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, positions)
