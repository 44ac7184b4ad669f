"""Every kind of attention: against its definition written out, against transformers, and with a cache.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A head width.
"""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import LongformerConfig, MistralConfig, MistralForCausalLM, OlmoeConfig, Qwen3Config
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from tests.models import attention_reference as plain
from tests.models.test_transformer import HF_SIZE, load_from_hf
from twohop import configs
from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, generate, init_weights
from twohop.models.attention import KVCache, attend, build_attention, rope_angles
from twohop.models.attention.masks import PATTERNS
from twohop.models.config import Activation
from twohop.models.config.attention import OPTIONS, AttentionConfig, QKNorm

T, DIM, HEADS = 40, 16, 4


def config_of(num_kv_heads: int | None = 2, **options) -> ModelConfig:
    if options.get("kind") == "latent":
        num_kv_heads = None
    return ModelConfig(
        vocab_size=30, max_seq_len=T, dim=DIM, num_layers=3, num_heads=HEADS, num_kv_heads=num_kv_heads, ffn_dim=24,
        init_std=0.3, attention=AttentionConfig(**options),
    )  # fmt: skip


def make(config: ModelConfig, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """One attention layer with random weights; norms and spans random too, so that nothing is hidden by their start."""
    torch.manual_seed(0)
    module = build_attention(config, **options).to(dtype)
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.4)
        if name == "span":
            parameter.data = torch.tensor([0.1, 0.9, -0.3, 1.2][: len(parameter)], dtype=dtype)
    return module


def make_x(length: int = T, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rope(length: int = T, head_dim: int = DIM // HEADS) -> tuple[Tensor, Tensor]:
    return rope_angles(torch.arange(length), head_dim, 10_000.0, torch.float64)


def assert_same_with_gradients(module: torch.nn.Module, ours, reference, x: Tensor) -> None:
    """Outputs, and the gradients of input and parameters under a random cotangent."""
    results = []
    for function in (ours, reference):
        inputs = x.clone().requires_grad_()
        y = function(inputs)
        cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
        names = [name for name, _ in module.named_parameters()]
        gradients = torch.autograd.grad(y, [inputs, *module.parameters()], cotangent)
        results.append({"output": y, "input": gradients[0], **dict(zip(names, gradients[1:], strict=True))})
    for name, value in results[0].items():
        assert value.abs().sum() > 0, name
        torch.testing.assert_close(value, results[1][name], rtol=1e-9, atol=1e-10, msg=name)


# Masks: patterns of the papers as sets.

MASKS = {
    "full": ({}, lambda h, q, k: True),
    "sliding": ({"window": 5}, plain.sliding(5, 1)),
    "sliding, window 1": ({"window": 1}, lambda h, q, k: q == k),
    "sliding, dilated": ({"window": 4, "dilation": 3}, plain.sliding(4, 3)),
    "strided": ({"stride": 6}, plain.strided(6, heads=False)),
    "strided, heads": ({"stride": 6, "split_heads": True}, plain.strided(6, heads=True)),
    "fixed": ({"stride": 6, "summary": 2}, plain.fixed(6, 2, heads=False)),
    "fixed, heads": ({"stride": 6, "summary": 2, "split_heads": True}, plain.fixed(6, 2, heads=True)),
    "bigbird": (
        {"window": 3, "dilation": 2, "global_tokens": 4, "random_blocks": 0},
        lambda h, q, k: plain.sliding(3, 2)(h, q, k) or q < 4 or k < 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masked_attention_is_its_definition(name, is_causal):
    options, sees = MASKS[name]
    module = make(config_of(kind=name.split(",")[0], **options), causal=is_causal)
    seen = plain.table(lambda h, q, k: sees(h, q, k) and (k <= q or not is_causal), HEADS, T, T)

    def reference(x: Tensor) -> Tensor:
        q, k, v = (plain.project(module, x, letter) for letter in "qkv")
        q, k = (plain.rope(heads, list(range(T)), 10_000.0) for heads in (q, k))
        return plain.join(module, plain.softmax_attention(q, k, v, seen))

    assert_same_with_gradients(module, lambda x: module(x, rope()), reference, make_x())


def seen_blocks(config: ModelConfig, layer: int, length: int, is_causal: bool = True) -> list[list[set[int]]]:
    """For every head and block of queries, the blocks of keys that its first query sees whole beyond its window."""
    module = make(config, causal=is_causal, layer=layer)
    mask = attend.dense_mask(module.mask, torch.empty(1, HEADS, length, 1), length, 0, 0)[0]
    size, window = config.attention.block, config.attention.window
    blocks = mask.unflatten(-1, (-1, size)).all(-1)
    return [
        [
            {j for j in blocks[h, i].nonzero().flatten().tolist() if (j + 1) * size <= i - window + 1 or j * size > i}
            for i in range(0, length, size)
        ]
        for h in range(HEADS)
    ]


def test_random_blocks_are_beyond_window_and_global_tokens_and_differ():
    options = {"kind": "bigbird", "window": 5, "global_tokens": 3, "random_blocks": 3, "block": 4}
    config = config_of(**options)
    drawn = seen_blocks(config, layer=0, length=160)
    for head in drawn:
        for i, blocks in enumerate(head):
            # Block 0 is partly global; the window of 5 covers the whole block before i, and none before that.
            candidates = set(range(1, i - 1))
            assert blocks <= candidates
            assert len(blocks) == min(3, len(candidates)), (i, blocks)
    assert drawn == seen_blocks(config, layer=0, length=160)
    assert [head[:20] for head in drawn] == seen_blocks(config, layer=0, length=80)  # the graph of a shorter sequence
    different = {str(head) for layer in range(3) for head in seen_blocks(config, layer, 160)}
    assert len(different) == 3 * HEADS
    # Both ways, the model's whole length is drawn from.
    both_ways = seen_blocks(config_of(**options), layer=0, length=T, is_causal=False)
    assert any(max(blocks, default=0) * 4 > i * 4 for head in both_ways for i, blocks in enumerate(head[1:], 1))


def test_random_blocks_are_drawn_evenly():
    config = config_of(kind="bigbird", window=1, global_tokens=0, random_blocks=1, block=1)
    counts = torch.zeros(40)
    for layer in range(400):
        for head in seen_blocks(config, layer, length=41):
            (block,) = head[40]
            counts[block] += 1
    expected = counts.sum() / 40
    assert ((counts - expected).square() / expected).sum() < 75  # chi-square, 39 degrees: 99.95 %


@pytest.mark.parametrize("kind", [kind for kind in PATTERNS if kind != "full"])
def test_flex_attention_is_sdpa_with_the_same_mask(kind, monkeypatch):
    """Uncompiled, FlexAttention runs on the CPU too, forwards."""
    module = make(config_of(kind=kind))
    monkeypatch.setattr(attend, "flex_kernel", lambda: flex_attention)
    q, k, v = (torch.randn(2, heads, T, 16) for heads in (HEADS, 2, 2))
    ours, theirs = attend.attend_flex(q, k, v, module.mask), attend.attend(q, k, v, module.mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels and their gradients need CUDA")
@pytest.mark.parametrize("kind", [kind for kind in PATTERNS if kind != "full"])
def test_flex_attention_on_cuda_is_sdpa_with_the_same_mask(kind):
    module = make(config_of(kind=kind))
    q, k, v = (torch.randn(2, heads, 256, 32, device="cuda", requires_grad=True) for heads in (HEADS, 2, 2))
    dense = attend.dense_mask(module.mask, q, 256, 0, 0)
    ours = attend.attend(q, k, v, module.mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)  # TF32 keeps 10 bits
    cotangent = torch.randn_like(ours)
    for one, two in zip(*(torch.autograd.grad(y, [q, k, v], cotangent) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


# Code that nobody here wrote.


def test_sliding_window_is_mistral():
    torch.manual_seed(0)
    hf = MistralForCausalLM(MistralConfig(**HF_SIZE, num_key_value_heads=2, head_dim=8, sliding_window=6)).eval()
    model = build_model(
        ModelConfig(
            vocab_size=50, max_seq_len=32, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48,
            tie_embeddings=False, activation=Activation.swiglu, attention=AttentionConfig(kind="sliding", window=6),
        )
    )  # fmt: skip
    load_from_hf(model, hf)
    ids = torch.randint(50, (3, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, hf(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "theirs", "config"),
    [
        (QKNorm.head, Qwen3Attention, Qwen3Config),
        (QKNorm.full, OlmoeAttention, OlmoeConfig),
    ],
)
def test_norms_of_queries_and_keys_are_those_of_qwen3_and_olmoe(norm, theirs, config):
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 4}
    hf = theirs(config(**sizes, rms_norm_eps=1e-5, attn_implementation="eager"), layer_idx=0).double()
    module = make(config_of(qk_norm=norm))
    hf.load_state_dict(_named_as_theirs(module), strict=True)
    x, (cos, sin) = make_x(), rope()
    causal = torch.full((T, T), -torch.inf).triu(1).expand(1, 1, T, T).double()
    expected, _ = hf(x, (torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None]), causal)
    # They norm in fp32, whatever the dtype.
    torch.testing.assert_close(module(x, rope()), expected, rtol=1e-5, atol=1e-5)


def _named_as_theirs(module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"{name[1]}_proj.weight" if name[0] == "w" else name: value for name, value in module.state_dict().items()}


def test_window_and_global_tokens_are_longformer():
    """Theirs has other projections for global positions; here they get the same weights. With padding."""
    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[8], attention_probs_dropout_prob=0.0
    )
    hf = LongformerSelfAttention(config, layer_id=0).double().eval()
    module = make(config_of(HEADS, kind="bigbird", window=5, global_tokens=3, random_blocks=0), causal=False)
    for ours, names in (("wq", "query"), ("wk", "key"), ("wv", "value")):
        for name in (names, f"{names}_global"):
            getattr(hf, name).weight.data = getattr(module, ours).weight.data
            getattr(hf, name).bias.data.zero_()
    module.wo.weight.data = torch.eye(DIM, dtype=torch.float64)
    x, valid = make_x(), torch.ones(2, T, dtype=torch.bool)
    valid[1, 30:] = False
    marks = torch.zeros(2, T, dtype=torch.float64).masked_fill(~valid, -10_000.0)
    marks[:, :3] = 10_000.0  # the first three are global
    (expected,) = hf(x, attention_mask=marks, is_index_masked=marks < 0, is_index_global_attn=marks > 0,
                     is_global_attn=True)[:1]  # fmt: skip
    y = module(x, key_mask_BS=valid)
    torch.testing.assert_close(y[valid], expected[valid], rtol=1e-6, atol=1e-6)


# Attention to other states.


def test_cross_attention_sees_what_is_no_padding():
    module = make(config_of(kind="sliding"), cross=True)
    x, memory = make_x(7), make_x(11, seed=3)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, 8:] = False

    def reference(x: Tensor) -> Tensor:
        q = plain.project(module, x, "q")
        k, v = (plain.project(module, memory, letter) for letter in "kv")
        return plain.join(module, plain.softmax_attention(q, k, v, valid[:, None, None].expand(-1, HEADS, 7, -1)))

    assert_same_with_gradients(module, lambda x: module(x, memory_BSD=memory, key_mask_BS=valid), reference, x)
    cache = module.new_cache(11)
    whole = module(x, memory_BSD=memory, key_mask_BS=valid)
    first = module(x[:, :4], cache=cache, memory_BSD=memory, key_mask_BS=valid)
    # From the second call on, the memory's keys come from the cache.
    second = module(x[:, 4:], cache=cache, memory_BSD=torch.full_like(memory, torch.nan), key_mask_BS=valid)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_cross_attention_with_positions_of_both_sequences():
    module = make(config_of(), cross=True)
    x, memory = make_x(7), make_x(11, seed=3)

    def reference(x: Tensor) -> Tensor:
        q = plain.rope(plain.project(module, x, "q"), list(range(7)), 10_000.0)
        k = plain.rope(plain.project(module, memory, "k"), list(range(11)), 10_000.0)
        every = torch.ones(HEADS, 7, 11, dtype=torch.bool)
        return plain.join(module, plain.softmax_attention(q, k, plain.project(module, memory, "v"), every))

    assert_same_with_gradients(
        module, lambda x: module(x, rope(7), memory_BSD=memory, memory_rope=rope(11)), reference, x
    )


def test_padding_of_cached_keys_is_not_seen():
    module = make(config_of(kind="sliding", window=6))
    x, valid = make_x(20), torch.ones(2, 20, dtype=torch.bool)
    valid[1, 3:9] = False
    whole = module(x, rope(20), key_mask_BS=valid)
    cache, angles = module.new_cache(20), rope(20)
    for t in range(20):
        y = module(x[:, t : t + 1], tuple(a[t : t + 1] for a in angles), cache, key_mask_BS=valid[:, : t + 1])
        torch.testing.assert_close(y[:, 0], whole[:, t])


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


# Models of every kind.

KINDS = {
    **{name: {"kind": name.split(",")[0], **options} for name, (options, _) in MASKS.items() if "1" not in name},
    "bigbird, random": {"kind": "bigbird", "window": 3, "global_tokens": 2, "random_blocks": 2, "block": 2},
    "memory": {"kind": "memory", "segment": 6, "memory": 9},
    "memory, compressed": {"kind": "memory", "segment": 6, "memory": 3, "compression": 3, "compressed": 4},
    "linear": {"kind": "linear", "chunk": 4},
    "retention": {"kind": "linear", "decay": True, "chunk": 4},
    "adaptive_span": {"kind": "adaptive_span", "window": 9, "ramp": 3, "span_loss": 0.01},
    "latent": {"kind": "latent", "q_rank": 6, "kv_rank": 5, "nope_dim": 3, "rope_dim": 4, "value_dim": 7},
    "latent keys": {"kind": "latent", "q_rank": 0, "kv_rank": 5, "nope_dim": 3, "rope_dim": 4, "value_dim": 7},
    "norm of heads": {"qk_norm": QKNorm.head},
    "norm of all": {"qk_norm": QKNorm.full},
}


def model_of(name: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    model = build_model(config_of(**KINDS[name], **options)).to(dtype)
    init_weights(model, 0)
    if name == "adaptive_span":
        for i, block in enumerate(model.blocks):
            block.attention.span.data.fill_(0.3 * i + 0.1)
    return model


def make_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(30, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [[T], [1] * T, [5, 1, 1, 9, 8, 1, 15]])
@pytest.mark.parametrize("name", KINDS)
def test_cached_logits_are_those_of_the_whole_sequence(name, pieces):
    model, ids = model_of(name).eval(), make_ids(T)
    with torch.no_grad():
        whole, cache = model(ids).logits, model.new_cache(T)
        cached = [model(piece, cache).logits for piece in ids.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(cached, 1), whole, rtol=1e-9, atol=1e-9)
    assert cache[0].length == T


@pytest.mark.parametrize("name", KINDS)
def test_generation_with_a_cache_is_generation_without(name):
    model, ids = model_of(name), make_ids(9)
    expected = ids
    with torch.no_grad():
        for _ in range(20):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generate(model, ids, 20, temperature=0), expected)


@pytest.mark.parametrize(("name", "most"), [("sliding", 5), ("sliding, dilated", 10), ("adaptive_span", 9)])
def test_cache_of_a_window_keeps_no_more_than_the_window(name, most):
    model, ids = model_of(name), make_ids(T)
    cache = model.new_cache(T)
    for piece in ids.split(1, 1):
        model(piece, cache)
        assert isinstance(cache[0], KVCache)
        assert cache[0].kept()[0].shape[2] <= most


def test_cache_of_a_memory_does_not_grow():
    model = model_of("memory, compressed")
    cache, sizes = model.new_cache(T), set()
    for piece in make_ids(T).split(1, 1):
        model(piece, cache)
        if cache[0].length > 30:
            sizes.add((cache[0].recent.kept()[0].shape[2], cache[0].compressed.kept()[0].shape[2]))
    # Memory and segment, and one: 3 + 6 + 1; of the compressed, those that wait behind the memory as well.
    assert all(recent <= 10 and compressed <= 8 for recent, compressed in sizes)


@pytest.mark.parametrize("name", KINDS)
def test_no_position_sees_a_later_one(name):
    model, ids = model_of(name).eval(), make_ids(T)
    changed = ids.clone()
    changed[:, 25:] = (ids[:, 25:] + 1) % 30
    one, two = model(ids).logits, model(changed).logits
    torch.testing.assert_close(one[:, :25], two[:, :25], rtol=1e-12, atol=1e-12)
    assert (one[:, 25:] != two[:, 25:]).any(-1).all()


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_gets_a_gradient_also_under_autocast(name):
    model = model_of(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(make_ids(T))
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), make_ids(T, 1).flatten())
    (loss + sum(output.losses.values())).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not 0 < p.grad.abs().sum() < torch.inf]
    assert without == []
    assert list(output.losses) == (["span"] if name == "adaptive_span" else [])


def test_losses_of_the_layers_are_added_and_spans_start_at_nothing():
    model = model_of("adaptive_span")
    assert model(make_ids(T)).losses["span"].item() == pytest.approx(0.01 * 9 * (0.1 + 0.4 + 0.7))
    init_weights(model, 0)
    assert all(block.attention.span.abs().sum() == 0 for block in model.blocks)


def test_attention_of_a_moe_model():
    config = config_of(**KINDS["retention"])
    config.moe = MoEConfig(experts=[4], every=1, router=RouterConfig(top_k=2))
    model = build_model(config).double()
    init_weights(model, 0)
    ids = make_ids(T)
    cache = model.new_cache(T)
    pieces = torch.cat([model.eval()(piece, cache).logits for piece in ids.split(13, 1)], 1)
    torch.testing.assert_close(pieces, model(ids).logits)


# Configuration.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "slidng"}, r"model\.attention\.kind=slidng: unknown, did you mean 'sliding'\?; use one of full, "),
        ({"window": 4}, r"model\.attention\.window=4 has no use with kind=full: .* kind=sliding or bigbird or adapt"),
        ({"kind": "sliding", "window": 0}, r"model\.attention\.window=0: use 1 or more"),
        ({"kind": "sliding", "dilation": 0}, r"model\.attention\.dilation=0: use 1 or more"),
        ({"kind": "sliding", "stride": 2}, r"model\.attention\.stride=2 has no use .* kind=strided or fixed"),
        ({"kind": "strided", "stride": 0}, r"model\.attention\.stride=0: use 1 or more"),
        ({"kind": "strided", "summary": 2}, r"model\.attention\.summary=2 has no use .* kind=fixed"),
        ({"kind": "sliding", "split_heads": False}, r"model\.attention\.split_heads=False has no use"),
        ({"kind": "fixed", "summary": 0}, r"model\.attention\.summary=0: use 1 or more"),
        ({"kind": "fixed", "stride": 4, "summary": 5}, r"model\.attention\.summary=5 is more than the stride=4"),
        ({"kind": "bigbird", "global_tokens": -1}, r"model\.attention\.global_tokens=-1: use 0 or more"),
        ({"kind": "bigbird", "random_blocks": -1}, r"model\.attention\.random_blocks=-1: use 0 or more"),
        ({"kind": "bigbird", "block": 0}, r"model\.attention\.block=0: use 1 or more"),
        ({"kind": "memory", "segment": 0}, r"model\.attention\.segment=0: use 1 or more"),
        ({"kind": "memory", "memory": 0}, r"model\.attention\.memory=0: use 1 or more"),
        ({"kind": "memory", "compression": 2}, r"compression=2 with compressed=0: use compression=1"),
        ({"kind": "memory", "compressed": 2}, r"compression=1 with compressed=2: use compression=1"),
        ({"kind": "memory", "compressed": 2, "compression": 3, "segment": 7}, r"segment=7 is no multiple .* use 9"),
        ({"kind": "memory", "compressed": 2, "compression": 3, "segment": 6}, r"memory=64 is no multiple .* use 66"),
        ({"kind": "linear", "chunk": 0}, r"model\.attention\.chunk=0: use 1 or more"),
        ({"decay": True}, r"model\.attention\.decay=True has no use with kind=full: .* kind=linear"),
        ({"kind": "adaptive_span", "ramp": 0}, r"model\.attention\.ramp=0: use 1 or more"),
        ({"kind": "adaptive_span", "span_loss": -1.0}, r"model\.attention\.span_loss=-1\.0: use 0 or more"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**options)


def test_null_is_the_default_of_the_kind():
    for kind, options in OPTIONS.items():
        config = AttentionConfig(kind=kind)
        assert {key: getattr(config, key) for key in options} == options
        assert AttentionConfig(**vars(config)) == config  # what a run stores is read again
    assert AttentionConfig(kind="sliding", window=3).dilation == 1


def test_presets_cover_every_kind():
    folder = Path(next(iter(configs.__path__))) / "attention"
    presets = [AttentionConfig(**yaml.safe_load(path.read_text())) for path in folder.glob("*.yaml")]
    assert {preset.kind for preset in presets} == set(OPTIONS)
