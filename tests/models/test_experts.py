"""The experts' activation, which has a backward of its own. Shapes: R rows, U and F widths before and after it."""

import pytest
import torch
from torch import Tensor

from twohop.models.config import Activation
from twohop.models.experts import Experts
from twohop.models.feed_forward import activate, up_width

ROWS, DIM, FFN_DIM = 37, 8, 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation", list(Activation))
def test_activation_gives_the_bits_of_autograd(activation: Activation, dtype: torch.dtype) -> None:
    experts = Experts(1, DIM, FFN_DIM, activation)
    h_RU = torch.randn(ROWS, up_width(FFN_DIM, activation), dtype=dtype, requires_grad=True)
    grad_RF = torch.randn(ROWS, FFN_DIM, dtype=dtype)
    ours, plain = experts.activate(h_RU), activate(h_RU, activation)
    assert ours.equal(plain)
    (expected,) = torch.autograd.grad(plain, h_RU, grad_RF)
    (actual,) = torch.autograd.grad(ours, h_RU, grad_RF.clone())
    assert actual.equal(expected)


@pytest.mark.parametrize("activation", list(Activation))
def test_activation_keeps_its_input_alone(activation: Activation) -> None:
    h_RU = torch.randn(ROWS, up_width(FFN_DIM, activation), requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        Experts(1, DIM, FFN_DIM, activation).activate(h_RU)
    assert [tensor.data_ptr() for tensor in kept] == [h_RU.data_ptr()]
