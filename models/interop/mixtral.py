"""Mixtral (Jiang 2024): every block an MoE layer, softmax over the chosen logits."""

from typing import Any

from twohop.models.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from twohop.models.interop.family import Family
from twohop.models.interop.hf_config import HFConfig


class Mixtral(Family):
    """Softmax over all experts with renormalised top-k is the same as Mixtral's softmax over the chosen ones."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    aliases = {".mlp.": ".block_sparse_moe."}  # noqa: RUF012
    layer_mlp = "block_sparse_moe"
    expert_names = ("w1", "w3", "w2")

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        hf.expect("router_jitter_noise", 0.0)
        window = hf.take("sliding_window", None)
        router = RouterConfig(top_k=hf.take("num_experts_per_tok"), renormalize=True)
        return {
            "attention": AttentionConfig() if window is None else AttentionConfig(kind="sliding", window=window),
            "moe": MoEConfig(experts=[hf.take("num_local_experts")], every=1, router=router),
        }

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        return {
            "num_local_experts": max(config.experts_by_block),
            "num_experts_per_tok": config.moe.router.top_k,
            "intermediate_size": config.moe.ffn_dim or config.ffn_dim,
            "sliding_window": config.attention.window if config.attention.kind == "sliding" else None,
        }
