"""What a family of transformers' models is: its config.json, and where its files hold each of our parameters.

Shapes: E experts of the layer, F hidden width, D model width.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from twohop.models.config import Activation, ModelConfig
from twohop.models.interop.hf_config import HFConfig, InteropError
from twohop.models.interop.rope import read_rope, write_rope

EXPERT = "{expert}"  # stands for an expert's number in a name
# Keys of config.json that change nothing in what the model computes from given weights.
INERT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


@dataclass(frozen=True)
class Stored:
    """Where files hold a parameter of ours.

    Attributes:
        ours: name of the parameter in `state_dict`.
        names: tensors that make it up, one below the other, in equal parts; with `EXPERT` in them, once an expert.
        whole: a single tensor [E, …] that some files hold instead of those of every expert.
        rows: our row i is row rows[i] of theirs; None: the same order.
        exact: written in fp32, whatever the type of the others.
    """

    ours: str
    names: tuple[str, ...]
    whole: str | None = None
    rows: tuple[int, ...] | None = None
    exact: bool = False


class Family:
    """A family is one file with a subclass, and one line in `FAMILIES`."""

    model_type: str  # as in config.json
    architecture: str  # the class in transformers
    sparse = True  # whether it has experts
    inert: frozenset[str] = frozenset()  # more keys of config.json that change nothing
    lacks: frozenset[str] = frozenset()  # keys that the families share, but not this one
    aliases: dict[str, str] = {}  # noqa: RUF012  (part of a name in some files: what others write)
    layer_mlp = "mlp"  # name of a layer's MoE part
    expert_names = ("gate_proj", "up_proj", "down_proj")

    def from_hf(self, hf: HFConfig) -> dict[str, Any]:
        """Options of `ModelConfig` beyond those that all families share."""
        raise NotImplementedError

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of config.json beyond those that all families share, as near to `config` as the family can come."""
        raise NotImplementedError

    def attention(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """The attention of one block; `ours` and `theirs` are prefixes with a final dot."""
        for our_name, their_name in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj"), ("wo", "o_proj")):
            yield Stored(f"{ours}{our_name}.weight", (f"{theirs}{their_name}.weight",))

    def moe(self, config: ModelConfig, ours: str, theirs: str) -> Iterator[Stored]:
        """The MoE layer of one block."""
        gate, up, down = (f"{theirs}experts.{EXPERT}.{name}.weight" for name in self.expert_names)
        yield Stored(f"{ours}router.gate.weight", (f"{theirs}gate.weight",))
        yield Stored(f"{ours}experts.up", (gate, up), whole=f"{theirs}experts.gate_up_proj")
        yield Stored(f"{ours}experts.down", (down,), whole=f"{theirs}experts.down_proj")

    def superfluous(self, config: ModelConfig) -> list[str]:
        """Patterns of tensors that files may hold although no model uses them."""
        return [r".*\.rotary_emb\.inv_freq"]

    def tensors(self, config: ModelConfig) -> Iterator[Stored]:
        """Every parameter and buffer of a model, once."""
        yield Stored("embed.weight", ("model.embed_tokens.weight",))
        yield Stored("norm.weight", ("model.norm.weight",))
        if not config.tie_embeddings:
            yield Stored("head.weight", ("lm_head.weight",))
        for i, experts in enumerate(config.experts_by_block):
            ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
            yield Stored(f"{ours}attention_norm.weight", (f"{theirs}input_layernorm.weight",))
            yield Stored(f"{ours}ffn_norm.weight", (f"{theirs}post_attention_layernorm.weight",))
            yield from self.attention(config, f"{ours}attention.", f"{theirs}self_attn.")
            if experts:
                yield from self.moe(config, f"{ours}moe.", f"{theirs}{self.layer_mlp}.")
            else:
                yield from mlp(f"{ours}mlp.", f"{theirs}mlp.")


def mlp(ours: str, theirs: str) -> Iterator[Stored]:
    """A SwiGLU network of three matrices, of which we hold two below one another."""
    yield Stored(f"{ours}up.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield Stored(f"{ours}down.weight", (f"{theirs}down_proj.weight",))


def read_config(family: Family, values: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a config.json.

    Raises:
        InteropError: a key is missing, unknown, or has a value that our models cannot follow.
    """
    hf = HFConfig(values, where)
    hf.expect("hidden_act", "silu")
    hf.expect("attention_dropout", 0.0)
    hf.expect("pretraining_tp", 1)
    if (quantization := hf.take("quantization_config", None)) is not None:
        raise InteropError(
            f"{where}: quantization_config={quantization.get('quant_method', quantization)}: "
            "the weights are quantised; convert them to bf16 or fp32 first"
        )
    try:
        config = ModelConfig(**(_shared_options(family, hf) | family.from_hf(hf)))
    except InteropError:
        raise
    except ValueError as error:
        raise InteropError(f"{where}: {error}") from None
    hf.finish(INERT | family.inert)
    return config


def _shared_options(family: Family, hf: HFConfig) -> dict[str, Any]:
    heads = hf.take("num_attention_heads")
    return {
        "name": family.model_type,
        "vocab_size": hf.take("vocab_size"),
        "max_seq_len": hf.take("max_position_embeddings"),
        "dim": hf.take("hidden_size"),
        "num_layers": hf.take("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": hf.take("num_key_value_heads", None) or heads,
        "head_dim": hf.take("head_dim", None),
        "ffn_dim": hf.take("intermediate_size"),
        "activation": Activation.swiglu,
        "norm_eps": hf.take("rms_norm_eps"),
        **read_rope(hf),
        "tie_embeddings": hf.take("tie_word_embeddings", False),
        "init_std": hf.take("initializer_range", 0.02),
    }


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The config.json nearest to `config`; it says the same only if `read_config` gives `config` back."""
    shared = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.key_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }
    return {key: value for key, value in (shared | family.to_hf(config)).items() if key not in family.lacks}


def matches(patterns: list[str], name: str) -> bool:
    """Whether one of the patterns is the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def qk_norms(ours: str, theirs: str) -> Iterator[Stored]:
    """The norms of queries and keys."""
    for name in ("q_norm", "k_norm"):
        yield Stored(f"{ours}{name}.weight", (f"{theirs}{name}.weight",))
