"""Spread: a row is read once and written once for each of its children.

That is P + C rows of traffic. A gather, one program for each child, would be 2 · C: with 8 experts for each token,
nearly twice as much.

Shapes: P parents, C children, D width, B columns of a block.
"""

import torch
import triton
import triton.language as tl

from twohop.comm.kernels.tiles import block_of


def spread(
    rows_PD: torch.Tensor, children_C: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """[C, D]: each parent's row, at the places of all its children, in `dtype`.

    Args:
        rows_PD: floating point.
        children_C: int64, the place of each child, grouped by parent. Places of no child are left as they are.
        offsets: int64 [P + 1]: the children of parent p are children_C[offsets[p]:offsets[p + 1]].
        dtype: None for that of the rows.
    """
    num_rows, d = rows_PD.shape
    copies_CD = rows_PD.new_empty(len(children_C), d, dtype=dtype)
    if copies_CD.numel() == 0:
        return copies_CD
    block = block_of(rows_PD)
    with torch.cuda.device_of(rows_PD):
        _spread[(num_rows, triton.cdiv(d, block))](
            rows_PD.contiguous(),
            children_C,
            offsets,
            copies_CD,
            d,
            BLOCK=block,
        )
    return copies_CD


@triton.jit
def _spread(rows, children, offsets, copies, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    parent = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < d
    row_B = tl.load(rows + parent * d + column_B, mask=inside_B).to(copies.dtype.element_ty)
    for child in range(tl.load(offsets + parent), tl.load(offsets + parent + 1)):
        place = tl.load(children + child)
        tl.store(copies + place * d + column_B, row_B, mask=inside_B)
