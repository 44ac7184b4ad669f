"""The kernels of spread and sum on a GPU, in Triton; what they compute is said by the torch code of `comm/tree.py`.

One file for each kernel. They import Triton, and are imported where they are called: never on a CPU, except where
the environment says TRITON_INTERPRET=1. Then Triton's interpreter runs them on the CPU, slowly: that is how tests do.
"""

import os

import torch


def fused(tensor: torch.Tensor) -> bool:
    """Whether work on `tensor` is done by these kernels; otherwise torch does it."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
