"""Attention that looks back by a memory, a sum or a span of its own: against recurrences written out.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A head width.
"""

import pytest
import torch
from torch import Tensor

from tests.models import attention_reference as plain
from tests.models.attention_layers import HEADS, T, assert_same_with_gradients, config_of, make, make_x, rope
from twohop.models.attention import build_attention
from twohop.models.config.attention import AttentionConfig, QKNorm


@pytest.mark.parametrize("kind", ["memory", "linear", "adaptive_span"])
def test_kinds_that_look_back_are_refused_where_all_is_seen(kind):
    with pytest.raises(ValueError, match=rf"model.attention.kind={kind} looks back only.* use one of full, sliding"):
        build_attention(config_of(kind=kind), causal=False)


# Memory.


@pytest.mark.parametrize(
    "options",
    [
        {"segment": 8, "memory": 8},
        {"segment": 6, "memory": 15},
        {"segment": 12, "memory": 4},
        {"segment": 6, "memory": 6, "compression": 3, "compressed": 2},
        {"segment": 4, "memory": 6, "compression": 2, "compressed": 7},
    ],
)
@pytest.mark.parametrize("norm", [QKNorm.none, QKNorm.full])
def test_memory_is_the_recurrence_of_transformer_xl(options, norm):
    """Whole models, called segment after segment, each layer given its own detached inputs of before."""
    config = config_of(kind="memory", qk_norm=norm, **options)
    layers = torch.nn.ModuleList(make(config) for _ in range(3))
    for seed, parameter in enumerate(layers.parameters()):
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(seed))

    def ours(x: Tensor) -> Tensor:
        for layer in layers:
            x = x + layer(x, rope())
        return x

    def reference(x: Tensor) -> Tensor:
        past = [x[:, :0] for _ in layers]
        outputs = []
        for start in range(0, T, config.attention.segment):
            h = x[:, start : start + config.attention.segment]
            for i, layer in enumerate(layers):
                inputs = h
                h = h + one_segment(layer, config.attention, past[i], h, start)
                past[i] = torch.cat([past[i], inputs.detach()], 1)
            outputs.append(h)
        return torch.cat(outputs, 1)

    assert_same_with_gradients(layers, ours, reference, make_x())


def one_segment(layer: torch.nn.Module, options: AttentionConfig, past: Tensor, h: Tensor, start: int) -> Tensor:
    """Compressed memory, memory and segment as one list of keys with their positions."""
    old = max(0, start - options.memory)
    rate, kept = options.compression, options.compressed
    blocks = range(old // rate)[-kept:] if kept else []
    keys, values, positions = [], [], []
    for block in blocks:
        states = past[:, block * rate : (block + 1) * rate]
        keys.append(plain.project(layer, states, "k").mean(2, keepdim=True))
        values.append(plain.project(layer, states, "v").mean(2, keepdim=True))
        positions.append(sum(range(block * rate, (block + 1) * rate)) / rate)
    near = torch.cat([past[:, old:], h], 1)
    keys.append(plain.project(layer, near, "k"))
    values.append(plain.project(layer, near, "v"))
    positions += range(old, start + h.shape[1])
    own = list(range(start, start + h.shape[1]))
    q = plain.rope(plain.project(layer, h, "q"), own, 10_000.0)
    k = plain.rope(torch.cat(keys, 2), positions, 10_000.0)
    seen = plain.table(lambda _, i, j: positions[j] <= own[i], HEADS, len(own), len(positions))
    return plain.join(layer, plain.softmax_attention(q, k, torch.cat(values, 2), seen))


def test_mean_of_keys_is_the_key_of_the_mean():
    """Without a norm of keys, compressing keys is compressing states: the paper's mean pooling."""
    module, x = make(config_of(kind="memory", compression=4, compressed=2)), make_x(4)
    for one, two in zip(module.keys_values(x), module.keys_values(x.mean(1, keepdim=True)), strict=True):
        torch.testing.assert_close(one.mean(2, keepdim=True), two)


# Linear attention and retention.


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_linear_attention_is_its_definition(chunk):
    module = make(config_of(kind="linear", chunk=chunk))

    def reference(x: Tensor) -> Tensor:
        """Katharopoulos 2020, equation 9, with RoFormer's rotation above the line (Su 2021, equation 19)."""
        q, k, v = (plain.project(module, x, letter) for letter in "qkv")
        q, k = (torch.where(heads > 0, heads + 1, heads.exp()) for heads in (q, k))
        turned_q, turned_k = (plain.rope(heads, list(range(T)), 10_000.0) for heads in (q, k))
        rows = []
        for n in range(T):
            above = sum((turned_q[:, :, n] * turned_k[:, :, m]).sum(-1, True) * v[:, :, m] for m in range(n + 1))
            rows.append(above / sum((q[:, :, n] * k[:, :, m]).sum(-1, True) for m in range(n + 1)))
        return plain.join(module, torch.stack(rows, 2))

    assert_same_with_gradients(module, lambda x: module(x, rope()), reference, make_x())


@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_retention_is_retnets_recurrence(chunk):
    module = make(config_of(kind="linear", decay=True, chunk=chunk))

    def reference(x: Tensor) -> Tensor:
        """Sun 2023, equations 6 to 8: S_n = γ S_{n-1} + k_nᵀ v_n, o_n = q_n S_n, norm of each head, gate."""
        q, k, v = (plain.project(module, x, letter) for letter in "qkv")
        q, k = (plain.rope(heads, list(range(T)), 10_000.0) for heads in (q, k / 2))  # 2 is √A
        gamma = torch.tensor([1 - 1 / 32, 1 - 1 / 64, 1 - 1 / 128, 1 - 1 / 256], dtype=x.dtype)[:, None, None]
        state, rows = torch.zeros(2, HEADS, 4, 4, dtype=x.dtype), []
        for n in range(T):
            state = gamma * state + k[:, :, n, :, None] * v[:, :, n, None, :]
            rows.append((q[:, :, n, :, None] * state).sum(2))
        y = plain.rms_norm(torch.stack(rows, 2))
        gate = x @ module.wg.weight.T
        gate = torch.stack(gate.split(4, -1), 1)
        return plain.join(module, y * gate / (1 + (-gate).exp()))

    assert_same_with_gradients(module, lambda x: module(x, rope()), reference, make_x())


# Adaptive span.


def test_adaptive_span_is_its_definition():
    module = make(config_of(kind="adaptive_span", window=20, ramp=4, span_loss=0.5))
    span = torch.tensor([0.02, 0.13, 0.57, 0.91], dtype=torch.float64)  # no ramp ends at a whole distance
    module.span.data = span.clone()

    def reference(x: Tensor) -> Tensor:
        """Sukhbaatar 2019, equations 3 and 4."""
        q, k, v = (plain.project(module, x, letter) for letter in "qkv")
        q, k = (plain.rope(heads, list(range(T)), 10_000.0) for heads in (q, k))
        distance = torch.arange(T)[:, None] - torch.arange(T)
        soft = ((4 + 20 * module.span[:, None, None] - distance) / 4).clamp(0, 1)
        seen = plain.table(lambda h, i, j: 0 <= i - j < 20, HEADS, T, T)
        return plain.join(module, plain.softmax_attention(q, k, v, seen, soft))

    assert_same_with_gradients(module, lambda x: module(x, rope()), reference, make_x())
    loss = module.take_losses()["span"]
    assert module.take_losses() == {}
    assert loss.item() == pytest.approx(0.5 * sum(20 * s for s in span.tolist()) / HEADS)
    torch.testing.assert_close(torch.autograd.grad(loss, module.span)[0], torch.full_like(span, 0.5 * 20 / HEADS))


def test_a_span_outside_its_range_counts_as_its_end_and_can_come_back():
    module = make(config_of(kind="adaptive_span", window=20, ramp=4))
    assert module.span.min() < 0 < 1 < module.span.max()
    outside = module(make_x(), rope())
    gradient = torch.autograd.grad(outside, module.span, torch.randn_like(outside))[0]
    assert gradient[2] != 0
    assert torch.autograd.grad(module.take_losses()["span"], module.span)[0][2:].tolist() == [0, 0]
    module.span.data.clamp_(0, 1)
    torch.testing.assert_close(module(make_x(), rope()), outside)
