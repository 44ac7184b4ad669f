"""How the kernels cut their rows: one program for each parent and each block of columns."""

import torch
import triton
import triton.language as tl

_BYTES = 4096  # of a row in one block: 32 for each thread, hence two loads under way


def block_of(rows: torch.Tensor) -> int:
    """Columns of a block, a power of two."""
    columns = max(1, min(rows.shape[1], _BYTES // rows.element_size()))
    block: int = triton.next_power_of_2(columns)
    return block


def wide(*dtypes: torch.dtype) -> tl.dtype:
    """What is calculated in: fp32, or fp64 if any of `dtypes` is."""
    return tl.float64 if torch.float64 in dtypes else tl.float32
