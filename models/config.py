"""What a model is made of, as plain dataclasses.

This module imports neither torch nor a config system, so that a command line can show its help at once.
Every `__post_init__` refuses an impossible value with a `ValueError` that names key, value and cure.
"""

import re
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from twohop.models.attention_config import AttentionConfig
from twohop.models.layer_counts import expert_counts


class Activation(Enum):
    """The feed-forward non-linearity. `swiglu` has three matrices, `gelu` two."""

    swiglu = "swiglu"
    gelu = "gelu"


class CapacityRounding(Enum):
    """How an expert's capacity B is rounded from K·N·C/E (see `twohop.models.capacity`)."""

    ceil = "ceil"
    round = "round"
    ceil4 = "ceil4"
    tutel = "tutel"


class Residual(Enum):
    """PR-MoE's residual branch: how the dense MLP and the routed expert are added (Rajbhandari 2022)."""

    none = "none"
    sum = "sum"
    learned = "learned"


class BatchPriority(Enum):
    """Which tokens fill the experts first: in their order, or by their largest or summed weight (Riquelme 2021)."""

    off = "off"
    max = "max"
    sum = "sum"


class BalanceOver(Enum):
    """Over which tokens the load-balancing loss counts: those of a micro-batch, or of the global batch (Qiu 2025)."""

    micro_batch = "micro_batch"
    global_batch = "global_batch"


class ModelKind(Enum):
    """`decoder`: a causal language model. `encoder_decoder`: from one sequence to another."""

    decoder = "decoder"
    encoder_decoder = "encoder_decoder"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass
class RouterConfig:
    """Which experts a token goes to. `name` is looked up in `twohop.models.routers`.

    A router refuses what it does not have; a default that it does not have means nothing to it.
    """

    name: str = "softmax_topk"
    top_k: int = 2
    renormalize: bool = False  # divide the weights of a token by their sum
    scale: float = 1.0  # sigmoid: factor of the weights; DeepSeek-V3 uses 2.5
    jitter: float = 0.0  # input noise of Switch: x · U(1 - jitter, 1 + jitter), training only
    noise: float = 1.0  # noisy: the logits' noise has the standard deviation noise / E, training only
    groups: int = 1  # sigmoid: parts of the experts in order; as many as an EP group has nodes: one for each node
    top_groups: int = 1  # sigmoid: how many groups a token may use
    bias_rate: float = 1e-3  # sigmoid: γ, by which the selection bias moves after a step; 0: no bias
    iterations: int = 8  # sinkhorn: normalisations of rows and columns
    load_balance_loss: float = 0.01  # weight α of E · Σ f·P, which is 1 when balanced
    load_balance_over: BalanceOver = BalanceOver.micro_batch
    sequence_loss: float = 0.0  # weight of the same within each sequence; DeepSeek-V3 uses 1e-4
    z_loss: float = 0.0  # weight of mean(logsumexp(logits)²); ST-MoE uses 1e-3
    importance_loss: float = 0.005  # noisy: weight of (std / mean)² of the experts' summed probabilities
    load_loss: float = 0.005  # noisy: weight of (std / mean)² of the experts' chances to be chosen

    def __post_init__(self) -> None:
        _require(self.top_k >= 1, f"model.moe.router.top_k={self.top_k}: a token needs at least 1 expert")
        _require(0 <= self.jitter < 1, f"model.moe.router.jitter={self.jitter}: use a value in [0, 1)")
        _require(self.scale > 0, f"model.moe.router.scale={self.scale}: use a positive factor")
        for key in ("noise", "bias_rate"):
            value = getattr(self, key)
            _require(value >= 0, f"model.moe.router.{key}={value}: use 0 for none, or more")
        _require(self.iterations >= 1, f"model.moe.router.iterations={self.iterations}: use 1 or more")
        _require(
            1 <= self.top_groups <= self.groups,
            f"model.moe.router.top_groups={self.top_groups}: use a number from 1 to groups={self.groups}",
        )
        for key in ("load_balance_loss", "sequence_loss", "z_loss", "importance_loss", "load_loss"):
            value = getattr(self, key)
            _require(value >= 0, f"model.moe.router.{key}={value}: a loss weight is at least 0")


@dataclass
class MoEConfig:
    """The Mixture-of-Experts layers of a model. `experts=[]` makes the model dense."""

    # One number for each MoE layer (0: a dense block in its place), or one for all. Also a text, "[32]*10 + [64]*2" or
    # "pyramid(32, 64, last=2)", which the `ModelConfig` around makes a list, since it knows the number of layers.
    experts: Any = field(default_factory=list)
    every: int = 2  # the blocks every, 2·every, … (counted from 1) are MoE blocks
    ffn_dim: int | None = None  # hidden width of an expert; null: the model's ffn_dim
    shared_ffn_dim: int = 0  # hidden width of the shared expert that sees every token; 0: none
    residual: Residual = Residual.none
    capacity_factor: float | None = None  # C while training; null: dropless
    eval_capacity_factor: float | None = None  # C at evaluation; null: dropless
    capacity_rounding: CapacityRounding = CapacityRounding.ceil
    min_capacity: int = 4
    batch_priority: BatchPriority = BatchPriority.off
    allow_non_causal: bool = False  # train a causal decoder with routes that depend on later tokens
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"model.moe.every={self.every}: use 1 for every block, 2 for every second")
        _require(self.shared_ffn_dim >= 0, f"model.moe.shared_ffn_dim={self.shared_ffn_dim}: use 0 for none")
        _require(self.min_capacity >= 0, f"model.moe.min_capacity={self.min_capacity}: use 0 or more")
        for key in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, key)
            _require(
                value is None or value > 0,
                f"model.moe.{key}={value}: use a positive factor, or null for dropless routing",
            )
        if not isinstance(self.experts, str):
            self.experts = expert_counts(self.experts)
            self._check_experts()

    def _check_experts(self) -> None:
        _require(
            any(self.experts) or not self.experts,
            f"model.moe.experts={self.experts}: no layer has experts: use [] for a dense model",
        )
        for count in self.experts:
            _require(count >= 0, f"model.moe.experts={self.experts}: use 1 or more experts, or 0 for a dense block")
            _require(
                self.router.top_k <= count or count == 0,
                f"model.moe.router.top_k={self.router.top_k} is more than the {count} experts of a layer "
                f"(model.moe.experts={self.experts}): lower top_k or add experts",
            )


@dataclass
class EncoderConfig:
    """The encoder of an encoder-decoder; width, heads and all else are the model's, whose own layers are the decoder."""

    num_layers: int = 4
    ffn_dims: list[int] = field(default_factory=list)  # see `ModelConfig`
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass
class ModelConfig:
    """A Transformer: RMSNorm, RoPE, grouped-query attention, dense or MoE feed-forward."""

    name: str = "dense"
    kind: ModelKind = ModelKind.decoder
    vocab_size: int | None = None  # null: taken from the data's tokenizer
    num_tasks: int | None = None  # null: the data has no tasks, or says how many
    max_seq_len: int = 256
    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None  # null: num_heads (MHA); fewer: grouped-query attention; 1: MQA
    head_dim: int | None = None  # null: dim / num_heads
    ffn_dim: int = 512
    ffn_dims: list[int] = field(default_factory=list)  # where dense blocks differ: one for each block; []: ffn_dim
    activation: Activation = Activation.gelu
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    tie_embeddings: bool = True
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    encoder: EncoderConfig | None = None  # of kind=encoder_decoder

    def __post_init__(self) -> None:
        for key in ("max_seq_len", "dim", "num_layers", "num_heads", "ffn_dim"):
            value = getattr(self, key)
            _require(value >= 1, f"model.{key}={value}: use a positive number")
        _require(
            self.head_dim is not None or self.dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}: "
            "change one of them or set model.head_dim",
        )
        _require(self.key_dim % 2 == 0, f"model.head_dim={self.key_dim} is odd: RoPE rotates pairs, use an even one")
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        wanted = self.num_layers // self.moe.every
        self.moe = replace(self.moe, experts=expert_counts(self.moe.experts, wanted))
        given = len(self.moe.experts)
        _require(
            given in (0, 1, wanted),
            f"model.moe.experts lists {given} layers, but model.num_layers={self.num_layers} with "
            f"model.moe.every={self.moe.every} makes {wanted} MoE layers: list {wanted} counts, or one for all",
        )
        _require(
            len(self.ffn_dims) in (0, self.num_layers) and all(width >= 1 for width in self.ffn_dims),
            f"model.ffn_dims={self.ffn_dims}: list a positive width for each of the {self.num_layers} blocks, or nothing",
        )
        is_pair = self.kind is ModelKind.encoder_decoder
        _require(
            is_pair or self.encoder is None,
            f"model.encoder has no use with model.kind={self.kind.value}: add model.kind=encoder_decoder",
        )
        if is_pair:
            self._settle_encoder()

    def _settle_encoder(self) -> None:
        """Check the encoder as a stack of its own, and keep its expert counts as the list that this makes of them."""
        self.encoder = self.encoder or EncoderConfig()
        try:
            self.encoder = replace(self.encoder, moe=self.encoder_stack.moe)
        except ValueError as error:
            names = re.sub(r"model\.(?=moe|ffn_dims|num_layers)", "model.encoder.", str(error))
            raise ValueError(names) from None

    @property
    def encoder_stack(self) -> "ModelConfig":
        """The encoder's blocks as the configuration of a model of their own."""
        assert self.encoder is not None
        own = {key.name: getattr(self.encoder, key.name) for key in fields(self.encoder)}
        return replace(self, kind=ModelKind.decoder, encoder=None, **own)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def key_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def experts_by_block(self) -> list[int]:
        """Number of experts of every block, in order; 0 for a dense block."""
        counts = [0] * self.num_layers
        blocks = range(self.moe.every - 1, self.num_layers, self.moe.every)
        if self.moe.experts:
            per_layer = self.moe.experts * len(blocks) if len(self.moe.experts) == 1 else self.moe.experts
            for block, experts in zip(blocks, per_layer, strict=True):
                counts[block] = experts
        return counts

    @property
    def experts_by_layer(self) -> list[int]:
        """Number of experts of every MoE layer, in order; those of an encoder come first."""
        encoder = self.encoder_stack.experts_by_layer if self.encoder is not None else []
        return encoder + [experts for experts in self.experts_by_block if experts]
