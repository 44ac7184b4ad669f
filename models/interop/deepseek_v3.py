"""DeepSeek-V3 (DeepSeek-AI 2024): latent attention, sigmoid routers with bias and groups, a shared expert."""

from collections.abc import Iterator
from typing import Any

from twohop.models.config import AttentionConfig, ModelConfig, MoEConfig, RouterConfig
from twohop.models.interop.family import Family, Stored, mlp
from twohop.models.interop.hf_config import HFConfig, InteropError


class DeepseekV3(Family):
    """The first blocks are dense. Of multi-token prediction, which only training uses, nothing is read."""

    model_type = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    inert = frozenset({"aux_loss_alpha", "ep_size", "head_dim", "num_nextn_predict_layers", "qk_head_dim", "seq_aux"})
    lacks = frozenset({"head_dim"})

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """See `Family`."""
        hf.expect("attention_bias", False)
        hf.expect("moe_layer_freq", 1)
        hf.expect("num_key_value_heads", hf.take("num_attention_heads"))
        hf.expect("rope_interleave", True)
        hf.expect("scoring_func", "sigmoid")
        hf.expect("topk_method", "noaux_tc")
        expert_ffn_dim, shared = hf.take("moe_intermediate_size"), hf.take("n_shared_experts")
        if not shared:
            raise InteropError(f"{hf.where}: n_shared_experts={shared} is not supported, only 1 or more")
        attention = AttentionConfig(
            kind="latent",
            q_rank=hf.take("q_lora_rank") or 0,
            kv_rank=hf.take("kv_lora_rank"),
            nope_dim=hf.take("qk_nope_head_dim"),
            rope_dim=hf.take("qk_rope_head_dim"),
            value_dim=hf.take("v_head_dim"),
        )
        router = RouterConfig(
            name="sigmoid",
            top_k=hf.take("num_experts_per_tok"),
            renormalize=hf.take("norm_topk_prob"),
            scale=hf.take("routed_scaling_factor"),
            groups=hf.take("n_group"),
            top_groups=hf.take("topk_group"),
        )
        dense, blocks = hf.take("first_k_dense_replace"), hf.take("num_hidden_layers")
        moe = MoEConfig(
            experts=[0] * dense + [hf.take("n_routed_experts")] * (blocks - dense),
            every=1,
            ffn_dim=expert_ffn_dim,
            shared_ffn_dim=shared * expert_ffn_dim,
            router=router,
        )
        return {"num_kv_heads": None, "head_dim": None, "attention": attention, "moe": moe}

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """See `Family`."""
        attention, moe, counts = config.attention, config.moe, config.experts_by_block
        expert_ffn_dim = moe.ffn_dim or config.ffn_dim
        return {
            "attention_bias": False,
            "num_key_value_heads": config.num_heads,
            "q_lora_rank": attention.q_rank or None,
            "kv_lora_rank": attention.kv_rank or 1,
            "qk_nope_head_dim": attention.nope_dim or 1,
            "qk_rope_head_dim": attention.rope_dim or 2,
            "v_head_dim": attention.value_dim or 1,
            "rope_interleave": True,
            "first_k_dense_replace": next(block for block, experts in enumerate(counts) if experts),
            "n_routed_experts": max(counts),
            "num_experts_per_tok": moe.router.top_k,
            "n_group": moe.router.groups,
            "topk_group": moe.router.top_groups,
            "norm_topk_prob": moe.router.renormalize,
            "routed_scaling_factor": moe.router.scale,
            "moe_intermediate_size": expert_ffn_dim,
            "n_shared_experts": max(1, moe.shared_ffn_dim // expert_ffn_dim),
            "num_nextn_predict_layers": 0,
        }

    def attention(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """See `Family`. Rotated rows stand in pairs (x_0, x_1), …, while ours are (x_i, x_{i + P/2})."""
        options = config.attention
        rope, head = options.rope_dim or 0, config.key_dim
        pairs = [*range(0, rope, 2), *range(1, rope, 2)]
        in_head = [*range(head - rope), *(head - rope + row for row in pairs)]
        query_rows = tuple(h * head + row for h in range(config.num_heads) for row in in_head)
        kv_rank = options.kv_rank or 0
        kv_rows = (*range(kv_rank), *(kv_rank + row for row in pairs))
        if options.q_rank:
            yield Stored(f"{ours}wq_down.weight", (f"{theirs}q_a_proj.weight",))
            yield Stored(f"{ours}q_norm.weight", (f"{theirs}q_a_layernorm.weight",))
        query = "q_b_proj" if options.q_rank else "q_proj"
        yield Stored(f"{ours}wq.weight", (f"{theirs}{query}.weight",), rows=query_rows)
        yield Stored(f"{ours}wkv_down.weight", (f"{theirs}kv_a_proj_with_mqa.weight",), rows=kv_rows)
        yield Stored(f"{ours}kv_norm.weight", (f"{theirs}kv_a_layernorm.weight",))
        yield Stored(f"{ours}wkv.weight", (f"{theirs}kv_b_proj.weight",))
        yield Stored(f"{ours}wo.weight", (f"{theirs}o_proj.weight",))

    def moe(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """See `Family`."""
        yield from super().moe(config, ours, theirs)
        yield Stored(f"{ours}router.bias", (f"{theirs}gate.e_score_correction_bias",), exact=True)
        yield from mlp(f"{ours}shared.", f"{theirs}shared_experts.")

    def superfluous(self, config: ModelConfig) -> list[str]:
        """See `Family`."""
        return [*super().superfluous(config), rf"model\.layers\.{config.num_layers}\..*"]
