"""Weighted spread: the backward of a weighted segment sum. Each row is read once for both gradients.

Shapes: P parents, C children, D width, B columns of a block.
"""

import torch
import triton
import triton.language as tl

from twohop.comm.kernels.tiles import block_of, wide


def weighted_spread(
    grad_PD: torch.Tensor,
    rows_CD: torch.Tensor,
    children_C: torch.Tensor,
    offsets: torch.Tensor,
    weights_C: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The backward of a weighted `segment_sum` in one pass: gradients of its rows [C, D] and of its weights [C].

    The first is each parent's gradient times the child's weight, in the rows' dtype. The second, in the weights', is
    the inner product of the child's row and the parent's gradient, and 0 where a weight belongs to no parent.
    """
    num_parents, d = grad_PD.shape
    grad_CD, grad_weights_C = torch.empty_like(rows_CD), torch.zeros_like(weights_C)
    if grad_CD.numel() == 0:
        return grad_CD, grad_weights_C
    with torch.cuda.device_of(rows_CD):
        _weighted_spread[(num_parents,)](
            grad_PD.contiguous(),
            rows_CD.contiguous(),
            children_C,
            offsets,
            weights_C,
            grad_CD,
            grad_weights_C,
            d,
            WIDE=wide(grad_PD.dtype, rows_CD.dtype, weights_C.dtype),
            BLOCK=block_of(rows_CD),
        )
    return grad_CD, grad_weights_C


@triton.jit
def _weighted_spread(  # type: ignore[no-untyped-def]
    grads, rows, children, offsets, weights, grad_rows, grad_weights, d, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    # A program has all columns of a parent, because the inner product needs them all; those of the gradient are in
    # the cache from the second child on.
    parent = tl.program_id(0).to(tl.int64)
    for child in range(tl.load(offsets + parent), tl.load(offsets + parent + 1)):
        place = tl.load(children + child)
        weight = tl.load(weights + child).to(WIDE)
        products_B = tl.zeros([BLOCK], WIDE)
        for start in range(0, d, BLOCK):
            column_B = start + tl.arange(0, BLOCK)
            inside_B = column_B < d
            grad_B = tl.load(grads + parent * d + column_B, mask=inside_B, other=0.0).to(WIDE)
            row_B = tl.load(rows + place * d + column_B, mask=inside_B, other=0.0).to(WIDE)
            products_B += grad_B * row_B
            grad_row_B = (grad_B * weight).to(grad_rows.dtype.element_ty)
            tl.store(grad_rows + place * d + column_B, grad_row_B, mask=inside_B)
        tl.store(grad_weights + child, tl.sum(products_B).to(grad_weights.dtype.element_ty))
