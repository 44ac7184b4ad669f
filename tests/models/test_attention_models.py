"""Models with every kind of attention: with a cache, causal, trainable, and refused where they are impossible.

Shapes: B sequences, T positions, S positions with a key, D model width, H heads, A head width.
"""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from tests.models.attention_layers import MASKS, T, config_of
from twohop import configs
from twohop.models import MoEConfig, RouterConfig, build_model, generate, init_weights
from twohop.models.attention import KVCache
from twohop.models.config.attention import OPTIONS, AttentionConfig, QKNorm

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
