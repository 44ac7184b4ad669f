"""Masked attention: against its definition written out, and against transformers.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A head width.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import LongformerConfig, MistralConfig, MistralForCausalLM, OlmoeConfig, Qwen3Config
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from tests.models import attention_reference as plain
from tests.models.attention_layers import (
    DIM,
    HEADS,
    MASKS,
    T,
    assert_same_with_gradients,
    config_of,
    make,
    make_x,
    rope,
)
from tests.models.test_transformer import HF_SIZE, load_from_hf
from twohop.models import ModelConfig, build_model
from twohop.models.attention import attend
from twohop.models.attention.masks import PATTERNS
from twohop.models.config import Activation
from twohop.models.config.attention import AttentionConfig, QKNorm


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
