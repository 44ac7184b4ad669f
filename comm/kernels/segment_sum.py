"""Segment sum: a parent's children are read in the order of its bag and added up in registers, without atomics.

The order of additions is that of the bag, so the bits are the same on every run and for every dispatch algorithm.

Shapes: P parents, C children, D width, B columns of a block.
"""

import torch
import triton
import triton.language as tl

from twohop.comm.kernels.tiles import block_of, wide


def segment_sum(
    rows_CD: torch.Tensor,
    children_C: torch.Tensor,
    offsets: torch.Tensor,
    weights_C: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[P, D]: every parent's children, times their weights, added up one after the other; rounded to `dtype` once.

    The transpose of `spread`. Sums are kept in fp32, those of fp64 rows in fp64.

    Args:
        rows_CD: floating point.
        children_C, offsets: see `spread`.
        weights_C: of the children, in order of children_C.
        dtype: None for that of the rows.
    """
    num_parents, d = len(offsets) - 1, rows_CD.shape[1]
    sums_PD = rows_CD.new_empty(num_parents, d, dtype=dtype)
    if sums_PD.numel() == 0:
        return sums_PD
    block = block_of(rows_CD)
    with torch.cuda.device_of(rows_CD):
        _segment_sum[(num_parents, triton.cdiv(d, block))](
            rows_CD.contiguous(),
            children_C,
            offsets,
            children_C if weights_C is None else weights_C,
            sums_PD,
            d,
            WEIGHTED=weights_C is not None,
            WIDE=wide(rows_CD.dtype),
            BLOCK=block,
            enable_fp_fusion=False,  # a product is rounded before it is added, as the reference does
        )
    return sums_PD


@triton.jit
def _segment_sum(  # type: ignore[no-untyped-def]
    rows, children, offsets, weights, sums, d, WEIGHTED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    parent = tl.program_id(0).to(tl.int64)
    column_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside_B = column_B < d
    total_B = tl.zeros([BLOCK], WIDE)
    for child in range(tl.load(offsets + parent), tl.load(offsets + parent + 1)):
        place = tl.load(children + child)
        row_B = tl.load(rows + place * d + column_B, mask=inside_B).to(WIDE)
        if WEIGHTED:
            row_B *= tl.load(weights + child).to(WIDE)
        total_B += row_B
    tl.store(sums + parent * d + column_B, total_B.to(sums.dtype.element_ty), mask=inside_B)
