"""Qwen3 (Yang 2025), dense and with experts: the queries and keys of each head are normed."""

from collections.abc import Iterator
from typing import Any

from twohop.models.config import AttentionConfig, ModelConfig, MoEConfig, QKNorm, RouterConfig
from twohop.models.interop.family import Family, Stored, qk_norms
from twohop.models.interop.hf_config import HFConfig


class Qwen3(Family):
    """A dense decoder."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    sparse = False
    inert = frozenset({"max_window_layers", "layer_types"})

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        hf.expect("attention_bias", False)
        hf.expect("use_sliding_window", False)
        hf.take("sliding_window", None)  # not used
        return {"attention": AttentionConfig(qk_norm=QKNorm.head)}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        return {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}

    def attention(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """See `Family`."""
        yield from super().attention(config, ours, theirs)
        yield from qk_norms(ours, theirs)


class Qwen3Moe(Qwen3):
    """Experts in the blocks decoder_sparse_step, 2 · decoder_sparse_step, … that `mlp_only_layers` does not list."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    sparse = True

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        step, dense = hf.take("decoder_sparse_step", 1), hf.take("mlp_only_layers", None) or []
        experts = hf.take("num_experts", None) or hf.take("num_local_experts")
        blocks = range(hf.take("num_hidden_layers"))
        router = RouterConfig(top_k=hf.take("num_experts_per_tok"), renormalize=hf.take("norm_topk_prob", False))
        moe = MoEConfig(
            experts=[0 if block in dense or (block + 1) % step else experts for block in blocks],
            every=1,
            ffn_dim=hf.take("moe_intermediate_size"),
            router=router,
        )
        return super().from_hf(hf) | {"moe": moe}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        return super().to_hf(config) | {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [block for block, experts in enumerate(config.experts_by_block) if not experts],
            "num_experts": max(config.experts_by_block),
            "num_experts_per_tok": config.moe.router.top_k,
            "norm_topk_prob": config.moe.router.renormalize,
            "moe_intermediate_size": config.moe.ffn_dim or config.ffn_dim,
        }
