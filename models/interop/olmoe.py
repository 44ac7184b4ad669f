"""OLMoE (Muennighoff 2024): many small experts without renormalised weights, queries and keys normed as a whole."""

from collections.abc import Iterator
from typing import Any

from twohop.models.config import AttentionConfig, ModelConfig, MoEConfig, QKNorm, RouterConfig
from twohop.models.interop.family import Family, Stored, qk_norms
from twohop.models.interop.hf_config import HFConfig


class Olmoe(Family):
    """Every block is an MoE layer, whose experts have the model's `intermediate_size`."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    lacks = frozenset({"head_dim"})

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        hf.expect("attention_bias", False)
        hf.expect("clip_qkv", None)
        renormalize = hf.take("norm_topk_prob", False)
        router = RouterConfig(top_k=hf.take("num_experts_per_tok"), renormalize=renormalize)
        return {
            "attention": AttentionConfig(qk_norm=QKNorm.full),
            "moe": MoEConfig(experts=[hf.take("num_experts")], every=1, router=router),
        }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        return {
            "num_experts": max(config.experts_by_block),
            "num_experts_per_tok": config.moe.router.top_k,
            "norm_topk_prob": config.moe.router.renormalize,
            "intermediate_size": config.moe.ffn_dim or config.ffn_dim,
            "attention_bias": False,
            "clip_qkv": None,
        }

    def attention(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """See `Family`."""
        yield from super().attention(config, ours, theirs)
        yield from qk_norms(ours, theirs)
