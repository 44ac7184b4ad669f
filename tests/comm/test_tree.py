"""Sums of children on a CPU, against additions one by one."""

from itertools import accumulate

import pytest
import torch

from twohop.comm.tree import Bag


@pytest.mark.parametrize("block_bytes", [1, 400, 2**20])
@pytest.mark.parametrize("counts", [[2, 0, 3, 4, 1, 0, 2, 0], [1, 0, 1, 1, 0, 1, 1, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_are_rounded_before_they_are_added(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, counts: list[int], block_bytes: int
) -> None:
    """Whatever is looked at together. Children behind the last offset have no parent."""
    monkeypatch.setattr("twohop.comm.tree.BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, *accumulate(counts)])
    rows_CD = torch.randn(14, 40, generator=generator, dtype=torch.float64).to(dtype)
    children_C = torch.randperm(14, generator=generator)
    weights_C = torch.rand(14, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)

    expected_PD = torch.zeros(8, 40, dtype=wide)
    for parent, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for child in range(start, end):
            product_D = rows_CD[children_C[child]].to(wide) * weights_C[child].to(wide)
            expected_PD[parent] = expected_PD[parent] + product_D
    bag = Bag(children_C, offsets)
    assert torch.equal(bag.sum(rows_CD, weights_C), expected_PD.to(dtype))
    assert torch.equal(bag.sum(rows_CD, weights_C, torch.float64), expected_PD.double())
    ones_C = torch.ones(14)
    assert torch.equal(bag.sum(rows_CD), bag.sum(rows_CD, ones_C))
