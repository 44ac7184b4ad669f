"""The kernels against the same sums and copies written out row by row, to the bit where the order is defined.

`test_kernels.py` runs this file, on the GPU if there is one, otherwise with Triton's interpreter.
"""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from twohop.comm.tree import Bag, Spread, inverse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few = settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Spread, int, torch.Tensor, torch.Tensor | None, torch.dtype, torch.Generator]:
    """A spread on one to three levels, as plans make them: (spread, rows, children's rows, their weights, dtype, …)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    num_rows = draw(st.integers(1, 5))
    bags: list[Bag] = []
    gather_C, parents = torch.arange(num_rows), num_rows
    for _ in range(draw(st.integers(1, 3))):
        children_of = torch.tensor([draw(st.integers(0, 3)) for _ in range(parents)], dtype=torch.long)
        parent_C = torch.arange(parents).repeat_interleave(children_of)
        bags.insert(0, Bag.from_parents(parent_C, torch.arange(len(parent_C)), parents))
        gather_C, parents = gather_C[parent_C], len(parent_C)
    sending_C = torch.randperm(parents, generator=generator)
    bags[0] = Bag(inverse(sending_C), bags[0].offsets)
    spread = Spread(gather_C[sending_C], tuple(bags))
    d = draw(st.sampled_from([1, 5, 16, 33]))
    dtype = draw(st.sampled_from(FLOATS))
    rows_CD = torch.randn(parents, d, dtype=torch.float64, generator=generator).to(dtype)
    weights_C = torch.rand(parents, generator=generator) if draw(st.booleans()) else None
    return spread, num_rows, rows_CD, weights_C, dtype, generator


def on_device(spread: Spread) -> Spread:
    bags = tuple(Bag(bag.children_C.to(DEVICE), bag.offsets.to(DEVICE)) for bag in spread.bags)
    return Spread(spread.gather_C.to(DEVICE), bags)


def rounded(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the kernels make of numbers: a GPU rounds to the nearest, the interpreter cuts to bf16."""
    if DEVICE == "cpu" and dtype is torch.bfloat16:
        numbers = (numbers.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return numbers.to(dtype)


def one_after_the_other(bag: Bag, rows_CD: torch.Tensor, weights_C: torch.Tensor | None) -> torch.Tensor:
    """What `Bag.sum` is said to be."""
    wide = torch.promote_types(rows_CD.dtype, torch.float32)
    sums = []
    for start, end in zip(bag.offsets[:-1].tolist(), bag.offsets[1:].tolist(), strict=True):
        total_D = torch.zeros(rows_CD.shape[1], dtype=wide)
        for child in range(start, end):
            row_D = rows_CD[bag.children_C[child]].to(wide)
            total_D = total_D + (row_D if weights_C is None else row_D * weights_C[child].to(wide))
        sums.append(rounded(total_D, rows_CD.dtype))
    return torch.stack(sums) if sums else rows_CD.new_zeros(0, rows_CD.shape[1])


def same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.cpu(), expected)


@few
@given(cases())
def test_copies(case) -> None:
    spread, num_rows, rows_CD, _, dtype, generator = case
    rows_RD = torch.randn(num_rows, rows_CD.shape[1], generator=generator).to(dtype)
    same(on_device(spread).down(rows_RD.to(DEVICE)), rows_RD[spread.gather_C])


@few
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_copies_in_another_dtype(case, to) -> None:
    spread, num_rows, rows_CD, _, dtype, generator = case
    assume(dtype is not torch.float64)
    rows_RD = torch.randn(num_rows, rows_CD.shape[1], generator=generator).to(dtype)
    same(on_device(spread).down(rows_RD.to(DEVICE), to), rounded(rows_RD, to)[spread.gather_C])


@few
@given(cases())
def test_sums(case) -> None:
    spread, _, rows_CD, weights_C, _, _ = case
    expected, weights = rows_CD, weights_C
    for bag in spread.bags:
        expected, weights = one_after_the_other(bag, expected, weights), None
    given_weights = None if weights_C is None else weights_C.to(DEVICE)
    same(on_device(spread).up(rows_CD.to(DEVICE), given_weights), expected)


@few
@given(cases())
def test_gradients_of_weighted_sums(case) -> None:
    spread, num_rows, rows_CD, _, dtype, generator = case
    grad_RD = torch.randn(num_rows, rows_CD.shape[1], generator=generator).to(dtype)
    weights_C = torch.rand(len(rows_CD), generator=generator)
    place_C = spread.bags[0].children_C
    copied_CD = grad_RD[spread.gather_C]
    weight_at_C = torch.empty_like(weights_C).index_copy_(0, place_C, weights_C)
    grad_CD, grad_weights_C = on_device(spread).weighted_down(
        grad_RD.to(DEVICE), rows_CD.to(DEVICE), weights_C.to(DEVICE)
    )
    same(grad_CD, rounded(copied_CD * weight_at_C[:, None], dtype))
    products_CD = copied_CD.double() * rows_CD.double()
    expected = products_CD.sum(1)[place_C]
    # Products and sums in fp32 by whatever tree; each of D additions may round once more.
    bound = products_CD.abs().sum(1)[place_C] * (rows_CD.shape[1] + 2) * torch.finfo(torch.float32).eps
    assert grad_weights_C.dtype == weights_C.dtype
    assert ((grad_weights_C.cpu() - expected).abs() <= bound).all()


def test_what_belongs_to_nobody() -> None:
    """Places of no child: nobody writes there, and weights of no parent have no gradient."""
    from twohop.comm.kernels.weighted_spread import weighted_spread

    bag = Bag(torch.tensor([2, 0, 1, 3], device=DEVICE), torch.tensor([0, 1, 1, 2], device=DEVICE))
    rows_CD, weights_C = torch.ones(4, 3, device=DEVICE), torch.ones(4, device=DEVICE)
    rows_CD[[1, 3]] = float("nan")
    grad_PD = torch.arange(9.0, device=DEVICE).view(3, 3)
    same(bag.sum(rows_CD, weights_C), torch.tensor([[1.0] * 3, [0.0] * 3, [1.0] * 3]))
    grad_CD, grad_weights_C = weighted_spread(grad_PD, rows_CD, bag.children_C, bag.offsets, weights_C)
    same(grad_CD[[2, 0]], grad_PD[[0, 2]].cpu())
    same(grad_weights_C, torch.tensor([3.0, 21.0, 0.0, 0.0]))


def test_rows_of_several_blocks() -> None:
    """Wider than a block, and not a multiple of it."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        rows_CD = torch.randn(4, 2500, generator=generator).to(dtype)
        parent_C = torch.tensor([0, 0, 1, 1])
        bag = Bag.from_parents(parent_C, torch.tensor([3, 1, 0, 2]), 2)
        spread = on_device(Spread(parent_C[inverse(bag.children_C)], (bag,)))
        weights_C = torch.rand(4, generator=generator)
        same(spread.up(rows_CD.to(DEVICE), weights_C.to(DEVICE)), one_after_the_other(bag, rows_CD, weights_C))
        same(spread.down(rows_CD[:2].to(DEVICE)), rows_CD[:2][spread.gather_C.cpu()])
        grad_CD, _ = spread.weighted_down(rows_CD[:2].to(DEVICE), rows_CD.to(DEVICE), weights_C.to(DEVICE))
        weight_at_C = torch.empty_like(weights_C).index_copy_(0, bag.children_C, weights_C)
        same(grad_CD, rounded(rows_CD[:2][spread.gather_C.cpu()] * weight_at_C[:, None], dtype))
