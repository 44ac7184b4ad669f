"""Whole models: against transformers, against themselves without a cache, and their sizes."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from twohop import configs
from twohop.models import (
    ModelConfig,
    MoEConfig,
    RouterConfig,
    build_model,
    expert_parameters,
    generate,
    init_weights,
    parameter_counts,
)
from twohop.models.config import Activation, CapacityRounding, Residual

MODEL_FOLDER = Path(next(iter(configs.__path__))) / "model"


def tiny(moe: MoEConfig | None = None, **options) -> ModelConfig:
    defaults = {
        "vocab_size": 50,
        "max_seq_len": 32,
        "dim": 32,
        "num_layers": 4,
        "num_heads": 4,
        "ffn_dim": 48,
        "init_std": 0.3,
    }
    return ModelConfig(**{**defaults, **options}, moe=moe or MoEConfig())


def build(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = build_model(config).to(dtype)
    init_weights(model, seed)
    return model


def make_ids(batch: int, length: int, vocab: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def preset(name: str, **overrides) -> ModelConfig:
    """A model preset as a config system would fill it in."""
    values = yaml.safe_load((MODEL_FOLDER / f"{name}.yaml").read_text()) | overrides
    moe = dict(values.pop("moe", {}))
    router = RouterConfig(**moe.pop("router", {}))
    for key, enum in (("residual", Residual), ("capacity_rounding", CapacityRounding)):
        if key in moe:
            moe[key] = enum(moe[key])
    values["activation"] = Activation(values["activation"])
    return ModelConfig(**values, moe=MoEConfig(**moe, router=router))


def load_from_hf(model: torch.nn.Module, hf: torch.nn.Module) -> None:
    """Copies a Llama's or Mixtral's weights; every parameter of ours is set."""
    theirs, state = hf.state_dict(), {}
    state["embed.weight"], state["norm.weight"] = theirs["model.embed_tokens.weight"], theirs["model.norm.weight"]
    if model.head is not None:
        state["head.weight"] = theirs["lm_head.weight"]
    for i in range(model.config.num_layers):
        ours, layer = f"blocks.{i}.", f"model.layers.{i}."
        state[ours + "attention_norm.weight"] = theirs[layer + "input_layernorm.weight"]
        state[ours + "ffn_norm.weight"] = theirs[layer + "post_attention_layernorm.weight"]
        for name in "qkvo":
            state[ours + f"attention.w{name}.weight"] = theirs[layer + f"self_attn.{name}_proj.weight"]
        if layer + "mlp.up_proj.weight" in theirs:
            gate_up = [theirs[layer + "mlp.gate_proj.weight"], theirs[layer + "mlp.up_proj.weight"]]
            state[ours + "mlp.up.weight"] = torch.cat(gate_up)
            state[ours + "mlp.down.weight"] = theirs[layer + "mlp.down_proj.weight"]
        else:
            state[ours + "moe.router.gate.weight"] = theirs[layer + "mlp.gate.weight"]
            state[ours + "moe.experts.up"] = theirs[layer + "mlp.experts.gate_up_proj"]
            state[ours + "moe.experts.down"] = theirs[layer + "mlp.experts.down_proj"]
    model.load_state_dict(state, strict=True)


HF_SIZE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "initializer_range": 0.3, "attn_implementation": "eager",
}  # fmt: skip


@pytest.mark.parametrize(("kv_heads", "head_dim", "tied"), [(4, 8, True), (2, 8, False), (1, 8, False), (2, 16, False)])
def test_dense_model_is_llama(kv_heads, head_dim, tied):
    """RMSNorm, RoPE, MHA/GQA/MQA, SwiGLU, tied and untied embeddings."""
    torch.manual_seed(0)
    hf_config = LlamaConfig(**HF_SIZE, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied)
    hf = LlamaForCausalLM(hf_config).eval()
    model = build_model(
        tiny(num_layers=2, num_kv_heads=kv_heads, head_dim=head_dim, tie_embeddings=tied, activation=Activation.swiglu)
    )
    load_from_hf(model, hf)
    ids = make_ids(3, 20)
    torch.testing.assert_close(model(ids).logits, hf(ids).logits, rtol=1e-4, atol=1e-4)


def test_moe_model_is_mixtral():
    torch.manual_seed(0)
    hf_config = MixtralConfig(**HF_SIZE, num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, head_dim=8,
                              rope_theta=10_000.0, tie_word_embeddings=False, router_aux_loss_coef=0.01)  # fmt: skip
    hf = MixtralForCausalLM(hf_config).eval()
    moe = MoEConfig(experts=[6], every=1, router=RouterConfig(top_k=2, renormalize=True))
    model = build_model(tiny(moe, num_layers=2, num_kv_heads=2, tie_embeddings=False, activation=Activation.swiglu))
    load_from_hf(model, hf)
    ids = make_ids(3, 20)
    output, theirs = model(ids), hf(ids, output_router_logits=True)
    torch.testing.assert_close(output.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    # Theirs pools the layers before it multiplies f and P, and counts K when balanced.
    probs = [logits.softmax(-1) for logits in theirs.router_logits]
    for stats, layer_probs in zip(output.moe, probs, strict=True):
        fraction = torch.bincount(layer_probs.topk(2).indices.flatten(), minlength=6) / (2 * 60)
        torch.testing.assert_close(stats.losses["load_balance"], 0.01 * 6 * (fraction * layer_probs.mean(0)).sum())


MODELS = {
    "dense": tiny(),
    "gqa, swiglu, untied": tiny(num_kv_heads=2, tie_embeddings=False, activation=Activation.swiglu),
    "moe": tiny(MoEConfig(experts=[4])),
    # Training would drop most tokens and jitter the rest: so this one also tells evaluation from training.
    "pr-moe": tiny(
        MoEConfig(
            experts=[2, 4],
            residual=Residual.sum,
            capacity_factor=0.25,
            min_capacity=1,
            router=RouterConfig(top_k=1, jitter=0.5),
        )
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_whole_sequence(name):
    model = build(MODELS[name], dtype=torch.float64).eval()
    ids = make_ids(2, 24)
    whole = model(ids).logits
    cache = model.new_cache(24)
    pieces = [model(piece, cache).logits for piece in ids.split([5, 1, 1, 9, 8], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_is_generation_without(name):
    model = build(MODELS[name], dtype=torch.float64)
    ids = make_ids(2, 6)
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model.eval()(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    model.train()
    assert torch.equal(generate(model, ids, 12, temperature=0), expected)
    assert model.training


def test_sampling_follows_temperature_top_k_and_generator():
    model, prompt = build(tiny(), dtype=torch.float64), make_ids(1, 3).expand(4000, -1)
    probs = (model(prompt[:1]).logits[0, -1] / 2.0).softmax(-1).detach()
    drawn = generate(model, prompt, 1, 2.0, None, torch.Generator().manual_seed(1))[:, -1]
    frequency = torch.bincount(drawn, minlength=50) / 4000
    assert (frequency - probs).abs().max() < 5 * math.sqrt(0.25 / 4000)
    few = generate(model, prompt, 1, 2.0, 3, torch.Generator().manual_seed(1))[:, -1]
    assert set(few.tolist()) == set(probs.topk(3).indices.tolist())
    again = generate(model, prompt, 1, 2.0, None, torch.Generator().manual_seed(1))[:, -1]
    assert torch.equal(drawn, again)


def test_too_long_sequences_are_refused():
    model = build(tiny())
    with pytest.raises(ValueError, match=r"33 tokens is longer than model.max_seq_len=32"):
        model(make_ids(1, 33))
    with pytest.raises(ValueError, match=r"max_new_tokens=30 after a prompt of 5 tokens .* at most 27 new tokens"):
        generate(model, make_ids(1, 5), 30)
    with pytest.raises(ValueError, match=r"prompt is empty"):
        generate(model, make_ids(1, 0), 3)


def test_a_model_without_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"model.vocab_size is null"):
        build_model(tiny(vocab_size=None))


def test_moe_layers_and_their_statistics():
    config = tiny(MoEConfig(experts=[2, 4, 6], every=2), num_layers=6)
    model = build(config)
    assert [(name, layer.dispatcher.num_experts) for name, layer in model.moe_layers()] == [
        ("blocks.1.moe", 2), ("blocks.3.moe", 4), ("blocks.5.moe", 6)
    ]  # fmt: skip
    output = model(make_ids(2, 10))
    assert [len(stats.load_E) for stats in output.moe] == [2, 4, 6]
    assert all(stats.load_E.sum() == 2 * 20 and stats.load_E.dtype == torch.int64 for stats in output.moe)
    parameters = dict(model.named_parameters())
    experts = {name: layer.dispatcher.num_experts for name, layer in expert_parameters(model).items()}
    assert experts == {f"blocks.{i}.moe.experts.{n}": e for i, e in ((1, 2), (3, 4), (5, 6)) for n in ("up", "down")}
    assert all(len(parameters[name]) == num_experts for name, num_experts in experts.items())


def test_every_parameter_gets_a_gradient():
    moe = MoEConfig(experts=[2, 4], residual=Residual.learned, shared_ffn_dim=8, router=RouterConfig(z_loss=1e-3))
    model = build(tiny(moe, tie_embeddings=False))
    output = model(make_ids(4, 32))
    (output.logits.logsumexp(-1).mean() + sum(sum(stats.losses.values()) for stats in output.moe)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []


def test_bf16_autocast_trains():
    model = build(tiny(MoEConfig(experts=[2, 4])))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(make_ids(2, 16))
        exact = output.logits.float().logsumexp(-1).mean() + output.moe[0].losses["load_balance"]
    exact.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights_work(name):
    ids = make_ids(2, 16)
    exact, model = build(MODELS[name]).eval(), build(MODELS[name], dtype=torch.bfloat16).eval()
    logits = model(ids, model.new_cache(16)).logits
    assert logits.dtype == torch.bfloat16
    difference = (logits - exact(ids).logits).norm() / exact(ids).logits.norm()
    # 8 bits are 0.4 % at each of some twenty roundings; a token near a tie may also go to another expert.
    assert difference < 0.2


def test_initial_weights_follow_seed_and_name():
    config = tiny(MoEConfig(experts=[2, 4], residual=Residual.learned), dim=64, init_std=0.02)
    first, again, other = (dict(build(config, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name, p in first.items() if p.dim() > 1]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    for name in drawn:
        std = 0.02 / math.sqrt(8) if name.endswith((".wo.weight", "down", "down.weight")) else 0.02
        assert abs(first[name].std() / std - 1) < 0.2, name
    assert all((p == (0 if name.endswith("bias") else 1)).all() for name, p in first.items() if p.dim() == 1)
    # Neither the number of experts nor of layers moves the weights of those that stay.
    larger = dict(build(tiny(MoEConfig(experts=[4, 6]), dim=64, init_std=0.02)).named_parameters())
    smaller = dict(build(tiny(MoEConfig(experts=[2, 6]), dim=64, init_std=0.02)).named_parameters())
    assert torch.equal(larger["blocks.1.moe.experts.up"][:2], smaller["blocks.1.moe.experts.up"])
    assert not torch.equal(larger["blocks.1.moe.experts.up"][0], larger["blocks.1.moe.experts.up"][1])


def test_initial_weights_do_not_depend_on_dtype_beyond_rounding():
    single, double = build(MODELS["moe"]), build(MODELS["moe"], dtype=torch.float64)
    for one, two in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(one.double(), two)


@pytest.mark.parametrize(
    ("name", "billions"), [("moe_350m", 13.15), ("pr_moe_350m", 4.12), ("moe_1.3b", 52.47), ("pr_moe_1.3b", 31.39)]
)
def test_published_sizes(name, billions):
    assert parameter_counts(preset(name)).total == pytest.approx(billions * 1e9, rel=0.01)


def test_active_parameters_are_those_of_a_dense_model_with_k_experts():
    moe = parameter_counts(tiny(MoEConfig(experts=[4, 8], router=RouterConfig(top_k=2))))
    experts_of_two_layers = 2 * 32 * 48
    assert moe.total == sum(p.numel() for p in build(tiny(MoEConfig(experts=[4, 8]))).parameters())
    assert moe.total - moe.active == (2 + 6) * experts_of_two_layers
    dense = parameter_counts(tiny())
    assert dense.total == dense.active


@pytest.mark.parametrize("name", ["dense", "moe", "moe_topk", "pr_moe"])
def test_quickstart_presets_run(name):
    config = preset(name, vocab_size=256)
    assert config.name == name
    model = build(config)
    output = model(make_ids(1, 32, 256))
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), make_ids(1, 32, 256, seed=1).flatten())
    assert abs(loss.item() - math.log(256)) < 0.3  # an untrained model knows nothing, and is not far from that
    assert len(output.moe) == (0 if name == "dense" else len(list(model.moe_layers())))
