"""Experts of 8 and 4 bits against plain rounding, and against torchao's own linear layers."""

import pytest
import torch
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

from twohop.models import ModelConfig, MoEConfig, build_model, init_weights
from twohop.models.config import Activation
from twohop.models.experts import Experts
from twohop.models.quantize import QuantizedExperts, _pack, _unpack, quantize_experts

COUNTS = [3, 0, 5, 1]


def experts(activation: Activation = Activation.gelu) -> Experts:
    torch.manual_seed(1)
    made = Experts(4, 32, 64, activation)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
            parameter[1, 0] *= 20  # a row on a scale of its own
    return made


@torch.no_grad()
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_off_by_half_a_step_and_outputs_are_theirs(bits: int, activation: Activation) -> None:
    given = experts(activation)
    rows_RD = torch.randn(9, 32)
    quantized = QuantizedExperts.of(given, bits)
    found = quantized(rows_RD, COUNTS)
    for name in ("up", "down"):
        weight, stored = getattr(given, name), getattr(quantized, name)
        integers = stored if bits == 8 else torch.stack([_unpack(matrix) for matrix in stored])
        group = weight.shape[-1] if bits == 8 else 32
        scale = getattr(quantized, f"{name}_scale")
        largest = weight.unflatten(-1, (-1, group)).abs().amax(-1)
        torch.testing.assert_close(scale, largest / (2 ** (bits - 1) - 0.5))
        step = scale.repeat_interleave(group, -1)
        rounded = integers * step
        assert ((rounded - weight).abs() <= step * 0.5001).all()
        weight.copy_(rounded)
    torch.testing.assert_close(found, given(rows_RD, COUNTS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("bits", "granularity"), [(8, PerAxis(0)), (4, PerGroup(32))])
def test_each_expert_is_two_of_torchaos_linear_layers(bits: int, granularity: PerAxis | PerGroup) -> None:
    given = experts()
    rows_RD = torch.randn(5, 32)
    found = QuantizedExperts.of(given, bits)(rows_RD, [0, 0, 5, 0])
    up, down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
    for linear, weight in ((up, given.up[2]), (down, given.down[2])):
        linear.weight.copy_(weight)
        quantize_(linear, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity))
    assert torch.equal(found, down(nn.functional.gelu(up(rows_RD))))


def test_four_bits_are_two_in_a_byte() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(3).view(4, 12)
    stored = _pack(integers)
    assert stored.shape == (4, 6)
    assert stored.dtype == torch.int8
    assert torch.equal(_unpack(stored), integers)


def test_size_and_parts() -> None:
    given = experts()
    size = {bits: sum(p.nbytes for p in QuantizedExperts.of(given, bits).parameters()) for bits in (8, 4)}
    weights, rows = 4 * 2 * 32 * 64, 4 * (64 + 32)
    assert size == {8: weights + 4 * rows, 4: weights // 2 + 4 * weights // 32}
    quantized = QuantizedExperts.of(given, 4)
    with torch.no_grad():
        assert quantized(torch.empty(0, 32), [0, 0, 0, 0]).shape == (0, 32)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_widths_that_a_scale_does_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="share a scale among 32, but the experts are 32 and 48 wide: use 8 bits"):
        QuantizedExperts(2, 32, 48, Activation.gelu, 4)


@torch.no_grad()
def test_a_model_is_the_same_quantised_now_or_built_quantised() -> None:
    def config(bits: int | None) -> ModelConfig:
        moe = MoEConfig([4], expert_bits=bits)
        return ModelConfig(vocab_size=11, dim=32, num_layers=2, num_heads=2, ffn_dim=64, max_seq_len=8, moe=moe)

    model, ids = build_model(config(None)).eval(), torch.randint(11, (2, 8))
    init_weights(model, 0)
    before = model(ids).logits
    quantize_experts(model, 4)
    built = build_model(config(4)).eval()
    built.load_state_dict(model.state_dict())
    after = built(ids).logits
    assert torch.equal(after, model(ids).logits)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0.02)
