"""Models of transformers, read and written: logits, names, every tensor, and what cannot be carried over."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.distributed import run_distributed
from tests.models.interop_workers import load, load_and_write, logits_of
from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, init_weights, parameter_counts
from twohop.models.config import Activation, AttentionConfig, ModelKind, QKNorm, Residual, RopeScaling, RopeScalingKind
from twohop.models.interop import InteropError, fit_family, read_folder
from twohop.models.interop.files import write_tensors
from twohop.models.interop.transfer import own_weights

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
DEEPSEEK = SIZES | {
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 12, "v_head_dim": 10,
}  # fmt: skip
# Contexts so short that within 12 tokens some frequencies are kept, some are interpolated and some are slowed.
ROPE = {"rope_theta": 100.0, "original_max_position_embeddings": 16}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0}
YARN = ROPE | {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 2.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.5,
}  # fmt: skip
MODELS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
    "mixtral, window": MixtralConfig(**SIZES, num_local_experts=8, sliding_window=5),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=16, head_dim=16, mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "olmoe": OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False, pad_token_id=None),
    "deepseek_v3": DeepseekV3Config(**DEEPSEEK, q_lora_rank=12),
    "deepseek_v3, yarn": DeepseekV3Config(**DEEPSEEK, q_lora_rank=None, rope_parameters=YARN),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0}),
    "llama, yarn": LlamaConfig(**SIZES, rope_parameters={**YARN, "mscale": None, "mscale_all_dim": None}),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}  # fmt: skip
MOE = [name for name, config in MODELS.items() if not isinstance(config, LlamaConfig | Qwen3Config)]
# Logits of size 1 to 10 from sums of some hundred products: fp32 rounding is near 1e-6.
CLOSE = {"rtol": 0, "atol": 1e-5}


def make_ids() -> torch.Tensor:
    return torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


def hf_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(make_ids()).logits


def write(model: torch.nn.Module, directory: Path) -> None:
    """What one process exports."""
    family, values = fit_family(model.config)
    (directory / "config.json").write_text(json.dumps(values))
    write_tensors(directory / "model.safetensors", own_weights(model, family, 0, 1))


@pytest.fixture(scope="module", params=MODELS)
def theirs(request, tmp_path_factory) -> tuple[str, Path, PreTrainedModel]:
    """A random model of each family: nothing is 0 or 1 that could be forgotten without a trace."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[request.param])
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 1 or "gate.weight" in name:
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim == 1 else torch.randn_like(tensor))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return request.param, directory, model


def test_logits_are_those_of_transformers(theirs):
    _, directory, model = theirs
    logits = hf_logits(model)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits_of(load(directory), make_ids()), logits, **CLOSE)


def test_what_was_read_is_written_to_the_bit(theirs, tmp_path):
    _, directory, _ = theirs
    write(load(directory), tmp_path)
    before, after = load_file(directory / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


def test_transformers_reads_what_is_written(theirs, tmp_path):
    _, directory, _ = theirs
    ours = load(directory)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(0.9)
    write(ours, tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(hf_logits(model), logits_of(ours, make_ids()), **CLOSE)


@pytest.mark.parametrize("ep_size", [2, 4])
def test_every_rank_reads_and_writes_its_own_experts(theirs, ep_size):
    name, directory, model = theirs
    if name not in MOE:
        pytest.skip("no experts")
    if ep_size == 2 and name != "deepseek_v3":
        pytest.skip("two replicas of the experts: one family will do")
    stored = load_file(directory / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for rank, (logits, reads, own) in enumerate(run_distributed(load_and_write, 4, directory, make_ids(), ep_size)):
        torch.testing.assert_close(logits, hf_logits(model), **CLOSE)
        share = range(rank % ep_size * 8 // ep_size, (rank % ep_size + 1) * 8 // ep_size)
        assert {expert_of(name) for name, _ in reads} == {*share, None}
        assert not own.keys() & written.keys(), "written twice"
        assert len(own) > 3, "every rank writes its part"
        written |= own
    assert written.keys() == stored.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, stored[name]), name


def expert_of(name: str) -> int | None:
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_in_one_tensor_are_read_by_slices(family, tmp_path):
    """As transformers holds them in memory, and as some save them."""
    model = AutoModelForCausalLM.from_config(MODELS[family])
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    for rank, (logits, reads, _) in enumerate(run_distributed(load_and_write, 2, tmp_path, make_ids(), 2)):
        torch.testing.assert_close(logits, hf_logits(model), **CLOSE)
        slices = {rows for name, rows in reads if ".experts.gate_up_proj" in name}
        assert slices == {(4 * rank, 4 * rank + 4)}


def test_many_files_and_bf16(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["qwen3_moe"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ours = load(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    in_fp32 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits_of(ours, make_ids()), hf_logits(in_fp32), **CLOSE)


# What cannot be read.


def tiny(**options) -> ModelConfig:
    defaults = {
        "vocab_size": 50, "max_seq_len": 32, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48,
        "activation": Activation.swiglu, "moe": MoEConfig(experts=[4], every=1, router=RouterConfig(renormalize=True)),
    }  # fmt: skip
    return ModelConfig(**defaults | options)


@pytest.fixture
def folder(tmp_path) -> Path:
    model = build_model(tiny())
    init_weights(model, seed=0)
    write(model, tmp_path)
    return tmp_path


def damage_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w3.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight, which norm\.weight needs"),
        (lambda t: t.pop(EXPERT), rf"lacks the tensor {re.escape(EXPERT)}, which blocks\.1\.moe\.experts\.up needs"),
        (
            lambda t: t.update({EXPERT: torch.ones(32, 48)}),
            r"3\.w3\.weight has the shape \[32, 48\], .* asks for \[48, 32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(33)}), r"shape \[33\], but config\.json asks for \[32\]"),
        (lambda t: t.update({"lm_head.bias": torch.ones(50)}), r"tensor lm_head\.bias has no place in a mixtral model"),
        (
            lambda t: t.update({EXPERT.replace("block_sparse_moe", "mlp"): torch.ones(48, 32)}),
            r"layers\.1\.mlp\.experts\.3\.w3\.weight are two names of the same",
        ),
        (
            lambda t: t.update({EXPERT.replace("3", "4", 1): torch.ones(48, 32), "z": torch.ones(1)}),
            r"experts\.4\.w3\.weight has no place .* \(2 such tensors\)",
        ),
    ],
)
def test_every_tensor_is_accounted_for(folder, change, message):
    damage_tensors(folder, change)
    with pytest.raises(InteropError, match=message):
        load(folder)


def test_tensors_that_no_model_uses_may_be_there(folder):
    damage_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load(folder)


def index(folder: Path, **weight_map: str) -> None:
    names = load_file(folder / "model.safetensors")
    known = dict.fromkeys(names, "model.safetensors") | {name.replace("__", "."): f for name, f in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": known}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: index(f, model__extra="model.safetensors"), r"disagree about tensor model\.extra"),
        (
            lambda f: index(f, model__extra="../other.safetensors"),
            r"names the file \.\./other\.safetensors, which is outside",
        ),
        (lambda f: index(f, model__extra="other.safetensors"), r"other\.safetensors: missing or damaged"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), r"index\.json: damaged \(KeyError"),
        (lambda f: (f / "model.safetensors").write_bytes(b"torch"), r"model\.safetensors: missing or damaged"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), r"pickled weights are not read"),
    ],
)
def test_damaged_files_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InteropError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"config\.json: model_type=gpt2 is not known here, only mixtral, qwen3_moe"),
        ({"hidden_act": "gelu"}, r"hidden_act=gelu is not supported, only silu"),
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1 is not supported"),
        ({"logit_scale": 2.0}, r"logit_scale=2\.0 is unknown here and may change what the model computes"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config=fp8: the weights are quantised"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type=longrope is not known here, only default, linear"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, r"original_max_seq_len=None: say how long"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"have \{'partial_rotary_factor': 0\.5\}, which is not known",
        ),
        ({"num_attention_heads": 5, "head_dim": None}, r"model\.num_heads=5 does not divide"),
    ],
)
def test_what_cannot_be_followed_is_named(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InteropError, match=message):
        read_folder(folder)


def test_a_missing_key_and_a_broken_file_are_named(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "num_local_experts"}))
    with pytest.raises(InteropError, match="has no key 'num_local_experts'"):
        read_folder(folder)
    path.write_text("[]")
    with pytest.raises(InteropError, match="not the configuration of a model"):
        read_folder(folder)
    with pytest.raises(InteropError, match=r"holds no config\.json"):
        read_folder(folder / "nowhere")


def test_keys_of_older_transformers_mean_the_same(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}
    path.write_text(json.dumps(values))
    _, config = read_folder(folder)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(RopeScalingKind.linear, factor=2.0)


# What cannot be written.

PR_MOE = MoEConfig(experts=[4, 8], every=1, residual=Residual.sum, router=RouterConfig(top_k=1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny(moe=PR_MOE), r"no class for a PR-MoE model; the nearest, .*model\.moe\.residual=sum, not none"),
        (tiny(activation=Activation.gelu), r"model\.activation=gelu, not swiglu"),
        (
            tiny(moe=MoEConfig(experts=[4])),
            r"Qwen3MoeForCausalLM, does not have model\.attention\.qk_norm=none, not head$",
        ),
        (
            tiny(moe=MoEConfig(experts=[4], every=1, router=RouterConfig())),
            r"model\.moe\.router\.renormalize=False, not True",
        ),
        (tiny(attention=AttentionConfig(kind="linear")), r"model\.attention\.kind=linear, not full"),
        (tiny(attention=AttentionConfig(kind="linear"), moe=MoEConfig()), r"LlamaForCausalLM, does not have"),
        (
            tiny(moe=MoEConfig(experts=[4], every=1, eval_capacity_factor=1.0, router=RouterConfig(renormalize=True))),
            r"model\.moe\.eval_capacity_factor=1\.0: the classes of transformers drop no tokens",
        ),
        (ModelConfig(kind=ModelKind.vit, vocab_size=10), r"no class for this model of kind vit"),
        (
            ModelConfig(kind=ModelKind.encoder_decoder, vocab_size=10),
            r"no class for this model of kind encoder_decoder",
        ),
    ],
)
def test_what_transformers_has_no_class_for_is_said(config, message):
    with pytest.raises(InteropError, match=message):
        fit_family(config)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (tiny(moe=MoEConfig(experts=[4], every=1, router=RouterConfig(name="topk_softmax"))), "mixtral"),
        (
            tiny(moe=MoEConfig(experts=[4], every=1, capacity_factor=1.0, router=RouterConfig(renormalize=True))),
            "mixtral",
        ),
        (tiny(attention=AttentionConfig(qk_norm=QKNorm.head), moe=MoEConfig(experts=[4])), "qwen3_moe"),
        (tiny(moe=MoEConfig()), "llama"),
    ],
)
def test_what_computes_the_same_is_written(config, family):
    assert fit_family(config)[0].model_type == family


# Published sizes: billions of parameters, and of those that a token uses.
PUBLISHED = {
    "Mixtral 8x7B": (MixtralConfig(), 46.7, 12.9),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, norm_topk_prob=True, rope_theta=1e6), 30.5, 3.3,
    ),
    "OLMoE-1B-7B": (OlmoeConfig(intermediate_size=1024), 6.9, 1.3),
    "DeepSeek-V3": (DeepseekV3Config(), 671.0, 37.5),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_sizes(name, tmp_path):
    hf, total, active = PUBLISHED[name]
    hf.save_pretrained(tmp_path)
    counts = parameter_counts(read_folder(tmp_path)[1])
    assert round(counts.total / 1e9, 1) == total
    assert counts.active / 1e9 == pytest.approx(active, abs=0.1)
