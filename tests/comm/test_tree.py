"""Sums of children on a CPU, against additions one by one."""

from itertools import accumulate, pairwise

import pytest
import torch

from twohop.comm.tree import Bag


@pytest.mark.parametrize("counts", [[1, 0, 1, 1, 0, 1, 1, 0], [2, 0, 2, 2, 1, 0, 2, 0]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_two_products_are_rounded_before_they_are_added(dtype: torch.dtype, counts: list[int]) -> None:
    """So that two ranks with a product each, or one with both, make the same sum."""
    rows_CD, wide, bag, weights_C = case(counts, dtype)
    expected_PD = torch.zeros(8, 40, dtype=wide)
    for parent, span in enumerate(pairwise(bag.offsets.tolist())):
        for child in range(*span):
            product_D = rows_CD[bag.children_C[child]].to(wide) * weights_C[child].to(wide)
            expected_PD[parent] = expected_PD[parent] + product_D
    assert torch.equal(bag.sum(rows_CD, weights_C), expected_PD.to(dtype))
    assert torch.equal(bag.sum(rows_CD, weights_C, torch.float64), expected_PD.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_children_behind_the_last_offset_have_no_parent(dtype: torch.dtype) -> None:
    rows_CD, _, bag, weights_C = case([2, 0, 3, 4, 1, 0, 2, 0], dtype)
    whole = Bag(bag.children_C[:12], bag.offsets)
    assert torch.equal(bag.sum(rows_CD), whole.sum(rows_CD))
    assert torch.equal(bag.sum(rows_CD, weights_C), whole.sum(rows_CD, weights_C[:12]))
    torch.testing.assert_close(bag.sum(rows_CD), bag.sum(rows_CD, torch.ones(14)))


def case(counts: list[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.dtype, Bag, torch.Tensor]:
    """14 rows, the dtype of their sums, their bag and their weights."""
    generator = torch.Generator().manual_seed(0)
    rows_CD = torch.randn(14, 40, generator=generator, dtype=torch.float64).to(dtype)
    bag = Bag(torch.randperm(14, generator=generator), torch.tensor([0, *accumulate(counts)]))
    return rows_CD, torch.promote_types(dtype, torch.float32), bag, torch.rand(14, generator=generator)
