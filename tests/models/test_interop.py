"""Models of transformers, read and written: logits, names, every tensor, and what cannot be carried over."""

import json
from pathlib import Path

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
from twohop.models import ModelConfig, MoEConfig, RouterConfig, build_model, init_weights
from twohop.models.config import Activation, Residual
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
    "initializer_range": 0.2,
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
