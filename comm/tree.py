"""Spread a row to its children, and sum the children back: the two local operations of dispatch and combine.

On a GPU each is one kernel of `comm/kernels`; what stands here for the CPU also says what they compute.

Shapes: R rows, C children, B children of a block, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from twohop.comm.kernels import fused

BLOCK_BYTES = 2**18  # of rows: several blocks fit a cache, and next to nothing is held between


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

    def sum(
        self, rows_CD: torch.Tensor, weights_C: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[parents, D]: every parent's children added up one after the other; a parent without children is 0.

        The order of additions is a function of the bag alone, never of where the rows stand, which is what makes
        all dispatch algorithms agree to the bit. Weights multiply the children, in order of `children_C`. Where no
        parent has more than two, products are rounded before they are added: such a sum does not depend on who adds.
        Half-precision rows are added up in fp32; sums are rounded once, to `dtype` (None: that of the rows).
        """
        if fused(rows_CD):
            from twohop.comm.kernels.segment_sum import segment_sum

            return segment_sum(rows_CD, self.children_C, self.offsets, weights_C, dtype)
        if len(rows_CD) == 0:
            return rows_CD.new_zeros(len(self.offsets) - 1, *rows_CD.shape[1:], dtype=dtype)
        wide_CD = rows_CD.to(torch.promote_types(rows_CD.dtype, torch.float32))
        weights_C = None if weights_C is None else weights_C.to(wide_CD.dtype)
        if weights_C is None or int(self.offsets.diff().max()) != 2:
            return _add_up(wide_CD, self.children_C, self.offsets, weights_C).to(dtype or rows_CD.dtype)
        firsts_PD, seconds_PD = (
            _add_up(wide_CD, self.children_C[place_C], offsets, weights_C[place_C])
            for place_C, offsets in map(self._places, (0, 1))
        )
        return firsts_PD.add_(seconds_PD).to(dtype or rows_CD.dtype)

    def _places(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the child of that number of each parent that has it stands in `children_C`; offsets of these alone."""
        has_P = self.offsets.diff() > number
        return (self.offsets[:-1] + number)[has_P], F.pad(has_P.cumsum(0), (1, 0))


def _add_up(
    rows_CD: torch.Tensor, children_C: torch.Tensor, offsets: torch.Tensor, weights_C: torch.Tensor | None
) -> torch.Tensor:
    end = int(offsets[-1])  # torch gives what is behind it to the last parent, in fp64 alone
    weights_C = None if weights_C is None else weights_C[:end]
    return F.embedding_bag(
        children_C[:end], rows_CD, offsets, mode="sum", per_sample_weights=weights_C, include_last_offset=True
    )


@dataclass(frozen=True)
class Spread:
    """Copies rows to children, in sending order; its transpose sums the children, level by level."""

    gather_C: torch.Tensor  # row to copy for each child
    bags: tuple[Bag, ...]  # innermost level first

    def down(self, rows_RD: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[children, D]: the copies, in `dtype` (None: that of the rows)."""
        if fused(rows_RD):
            from twohop.comm.kernels.spread import spread

            return spread(rows_RD, *self._leaves(), dtype=dtype)
        return rows_RD.index_select(0, self.gather_C).to(dtype or rows_RD.dtype)

    def up(
        self, rows_CD: torch.Tensor, weights_C: torch.Tensor | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """[rows, D]: the sums. Weights, if any, belong to the innermost children in order of their bag."""
        for bag in self.bags[:-1]:
            rows_CD = bag.sum(rows_CD, weights_C)
            weights_C = None
        return self.bags[-1].sum(rows_CD, weights_C, dtype)

    def weighted_down(
        self, grad_RD: torch.Tensor, rows_CD: torch.Tensor, weights_C: torch.Tensor, of_weights: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The backward of `up` with weights, of one level: gradients of its rows and, if wanted, of its weights."""
        if fused(rows_CD):
            from twohop.comm.kernels.weighted_spread import weighted_spread

            return weighted_spread(grad_RD, rows_CD, *self._leaves(), weights_C)
        place_C = self.bags[0].children_C  # of each weight among the rows
        weight_C1 = torch.empty_like(weights_C).index_copy_(0, place_C, weights_C).unsqueeze(1)
        grad_CD, dots_C = torch.empty_like(rows_CD), torch.empty_like(weights_C)
        # In blocks, so that what is between is still in the cache when it is used again.
        size = max(1, BLOCK_BYTES // max(1, rows_CD[:1].nbytes))
        parts = (tensor.split(size) for tensor in (self.gather_C, rows_CD, weight_C1, grad_CD, dots_C))
        for gather_B, rows_BD, weight_B1, grad_BD, dots_B in zip(*parts, strict=True):
            copies_BD = grad_RD.index_select(0, gather_B)
            if of_weights:
                torch.sum(copies_BD.to(weights_C.dtype) * rows_BD, -1, out=dots_B)
            torch.mul(copies_BD, weight_B1, out=grad_BD)
        return grad_CD, dots_C.index_select(0, place_C) if of_weights else None

    def _leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Children and offsets, as of a `Bag`, of the rows themselves: all levels at once."""
        innermost, *outer = self.bags
        offsets = innermost.offsets
        for bag in outer:  # whose children stand in the order of the parents of the level inside
            offsets = offsets.index_select(0, bag.offsets)
        return innermost.children_C, offsets


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order`."""
    positions = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, positions)
