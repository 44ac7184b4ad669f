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
from twohop.models.rope_config import RopeScaling, RopeScalingKind


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


class CapacityPolicy(Enum):
    """How the capacity factor C is found while training: given, or by each layer's measured load.

    `dynamic`: the smallest that drops nothing (Tutel; DynaMoE, Kossmann 2022). `schedule`: a margin above the moving
    average of what would have dropped nothing.
    """

    static = "static"
    dynamic = "dynamic"
    schedule = "schedule"


class Residual(Enum):
    """PR-MoE's residual branch: how the dense MLP and the routed expert are added (Rajbhandari 2022)."""

    none = "none"
    sum = "sum"
    learned = "learned"


class BatchPriority(Enum):
    """Which tokens fill the experts first: in their order, or by their largest or summed weight (Riquelme 2021)."""

    none = "none"
    max = "max"
    sum = "sum"


class BalanceOver(Enum):
    """Over which tokens the load-balancing loss counts: those of a micro-batch, or of the global batch (Qiu 2025)."""

    micro_batch = "micro_batch"
    global_batch = "global_batch"


class ModelKind(Enum):
    """`decoder`: a causal language model. `encoder_decoder`: from one sequence to another. `vit`: classes of images."""

    decoder = "decoder"
    encoder_decoder = "encoder_decoder"
    vit = "vit"


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
        _require(
            self.load_balance_loss != 0 or self.load_balance_over is BalanceOver.micro_batch,
            f"model.moe.router.load_balance_over={self.load_balance_over.value} has no use with "
            "model.moe.router.load_balance_loss=0: leave it out",
        )
        for key in ("load_balance_loss", "sequence_loss", "z_loss", "importance_loss", "load_loss"):
            value = getattr(self, key)
            _require(value >= 0, f"model.moe.router.{key}={value}: a loss weight is at least 0")


@dataclass
class AssignmentCacheConfig:
    """Training with a micro-batch's earlier assignments instead of the router (DynaMoE, Kossmann 2022).

    Needs batches that come again: data.order=batches.
    """

    enabled: bool = False
    trigger: float = 0.9  # a layer uses its cache while the moving average of repeated assignments is at least this
    check_every: int = 10  # steps; a layer that uses its cache routes live in each of these, to see what still repeats
    max_plans: int | None = None  # kept by a layer on each rank, up to the end of a step; null: one a micro-batch

    def __post_init__(self) -> None:
        key = "model.moe.cache"
        _require(0 < self.trigger <= 1, f"{key}.trigger={self.trigger}: use a fraction above 0, at most 1")
        _require(self.check_every >= 2, f"{key}.check_every={self.check_every}: use 2 steps or more")
        _require(
            self.max_plans is None or self.max_plans >= 1, f"{key}.max_plans={self.max_plans}: use 1 or more, or null"
        )
        for name in ("trigger", "check_every", "max_plans"):
            value = getattr(self, name)
            _require(
                self.enabled or value == getattr(AssignmentCacheConfig, name),
                f"{key}.{name}={value} has no use with {key}.enabled=false: enable it or leave it out",
            )


@dataclass
class MoEConfig:
    """The Mixture-of-Experts layers of a model. `experts=[]` makes the model dense."""

    # One number for each MoE layer (0: a dense block in its place), or one for all. Also a text, "[32]*10 + [64]*2" or
    # "pyramid(32, 64, last=2)", which the `ModelConfig` around makes a list, since it knows the number of layers.
    experts: Any = field(default_factory=list)
    every: int = 2  # the blocks every, 2·every, … (counted from 1) are MoE blocks
    last: int | None = None  # only the last so many of these (V-MoE's last-n, Riquelme 2021); null: all
    ffn_dim: int | None = None  # hidden width of an expert; null: the model's ffn_dim
    expert_bits: int | None = None  # of a run that was exported with fewer bits, 8 or 4; null: full precision
    shared_ffn_dim: int = 0  # hidden width of the shared expert that sees every token; 0: none
    residual: Residual = Residual.none
    capacity_policy: CapacityPolicy = CapacityPolicy.static
    capacity_factor: float | None = None  # static: C while training; null: dropless
    capacity_bound: float | None = None  # dynamic, schedule: the most that C may be; null: no bound
    capacity_margin: float = 1.1  # schedule: C ÷ the moving average of what would have dropped nothing
    eval_capacity_factor: float | None = None  # C at evaluation; null: dropless
    capacity_rounding: CapacityRounding = CapacityRounding.ceil
    min_capacity: int = 4
    batch_priority: BatchPriority = BatchPriority.none
    allow_non_causal: bool = False  # train a causal decoder with routes that depend on later tokens
    router: RouterConfig = field(default_factory=RouterConfig)
    cache: AssignmentCacheConfig = field(default_factory=AssignmentCacheConfig)

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"model.moe.every={self.every}: use 1 for every block, 2 for every second")
        _require(self.last is None or self.last >= 1, f"model.moe.last={self.last}: use 1 or more, or null for all")
        _require(self.expert_bits in (None, 4, 8), f"model.moe.expert_bits={self.expert_bits}: use 8, 4 or null")
        _require(self.shared_ffn_dim >= 0, f"model.moe.shared_ffn_dim={self.shared_ffn_dim}: use 0 for none")
        _require(self.min_capacity >= 0, f"model.moe.min_capacity={self.min_capacity}: use 0 or more")
        self._check_capacity_policy()
        self._check_router()
        for key in ("capacity_factor", "eval_capacity_factor", "capacity_bound"):
            value = getattr(self, key)
            _require(
                value is None or value > 0,
                f"model.moe.{key}={value}: use a positive factor, or null for dropless routing",
            )
        if not isinstance(self.experts, str):
            self.experts = expert_counts(self.experts)
            self._check_experts()

    def _check_capacity_policy(self) -> None:
        policy = self.capacity_policy
        has_use = {
            "capacity_factor": policy is CapacityPolicy.static,
            "capacity_bound": policy is not CapacityPolicy.static,
            "capacity_margin": policy is CapacityPolicy.schedule,
        }
        for key, used in has_use.items():
            value, default = getattr(self, key), getattr(MoEConfig, key)
            _require(
                used or value == default,
                f"model.moe.{key}={value} has no use with capacity_policy={policy.value}: set it to "
                f"{'null' if default is None else default}, or use another policy",
            )
        _require(self.capacity_margin > 0, f"model.moe.capacity_margin={self.capacity_margin}: use a positive factor")
        if policy is CapacityPolicy.schedule:
            _require(
                self.capacity_rounding is CapacityRounding.ceil,
                f"model.moe.capacity_rounding={self.capacity_rounding.value} has no use with capacity_policy=schedule, "
                "which rounds up: leave it out",
            )

    @property
    def drops_in_training(self) -> bool:
        """Whether a capacity may drop assignments while training."""
        factor = self.capacity_factor if self.capacity_policy is CapacityPolicy.static else self.capacity_bound
        return factor is not None or self.capacity_policy is CapacityPolicy.schedule

    def _check_router(self) -> None:
        if self.batch_priority is not BatchPriority.none:
            key = f"model.moe.batch_priority={self.batch_priority.value}"
            _require(
                self.drops_in_training or self.eval_capacity_factor is not None,
                f"{key} has no use without a capacity: set capacity_factor or eval_capacity_factor, or leave it out",
            )
            _require(
                self.batch_priority is not BatchPriority.sum or not self.router.renormalize,
                f"{key} has no use with model.moe.router.renormalize=true, which makes every sum 1: use max",
            )

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
    """The encoder of an encoder-decoder; all else is as in the model, whose own layers are the decoder."""

    num_layers: int = 4
    ffn_dims: list[int] = field(default_factory=list)  # see `ModelConfig`
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass
class VisionConfig:
    """What a ViT sees: square images, cut into square patches, which are its tokens."""

    image_size: int = 8  # pixels of height and width
    patch_size: int = 2
    channels: int = 1

    def __post_init__(self) -> None:
        for key in ("image_size", "patch_size", "channels"):
            value = getattr(self, key)
            _require(value >= 1, f"model.vision.{key}={value}: use a positive number")
        _require(
            self.image_size % self.patch_size == 0,
            f"model.vision.patch_size={self.patch_size} does not divide image_size={self.image_size}: change one",
        )

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2


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
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    tie_embeddings: bool = True
    init_std: float = 0.02
    layer_drop: float = 0.0  # the part of the steps that leave the last block out; less, in proportion, before it
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    encoder: EncoderConfig | None = None  # of kind=encoder_decoder
    vision: VisionConfig | None = None  # of kind=vit

    def __post_init__(self) -> None:
        for key in ("max_seq_len", "dim", "num_layers", "num_heads", "ffn_dim"):
            value = getattr(self, key)
            _require(value >= 1, f"model.{key}={value}: use a positive number")
        _require(0 <= self.layer_drop < 1, f"model.layer_drop={self.layer_drop}: use a part of the steps in [0, 1)")
        _require(
            self.layer_drop == 0 or self.kind is ModelKind.decoder,
            f"model.layer_drop={self.layer_drop} has no use with model.kind={self.kind.value}: leave it out",
        )
        _require(
            self.head_dim is not None or self.attention.kind == "latent" or self.dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}: "
            "change one of them or set model.head_dim",
        )
        self._check_rope_and_latent()
        _require(self.rotary_dim % 2 == 0, f"model.head_dim={self.key_dim} is odd: RoPE rotates pairs, use an even one")
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        wanted = len(self._moe_blocks)
        _require(
            self.moe.last in (None, wanted),
            f"model.moe.last={self.moe.last}: model.num_layers={self.num_layers} with model.moe.every={self.moe.every} "
            f"has only {wanted} such blocks: lower last, or use null for all",
        )
        self.moe = replace(self.moe, experts=expert_counts(self.moe.experts, wanted))
        given = len(self.moe.experts)
        _require(
            given in (0, 1, wanted),
            f"model.moe.experts lists {given} layers, but model.num_layers={self.num_layers} with "
            f"model.moe.every={self.moe.every} makes {wanted} MoE layers: list {wanted} counts, or one for all",
        )
        _require(
            len(self.ffn_dims) in (0, self.num_layers) and all(width >= 1 for width in self.ffn_dims),
            f"model.ffn_dims={self.ffn_dims}: list a positive width for each of the {self.num_layers} blocks, or none",
        )
        is_pair = self.kind is ModelKind.encoder_decoder
        _require(
            is_pair or self.encoder is None,
            f"model.encoder has no use with model.kind={self.kind.value}: add model.kind=encoder_decoder",
        )
        if is_pair:
            self._settle_encoder()
        self._settle_vision()

    def _check_rope_and_latent(self) -> None:
        kind, scaling = self.attention.kind, self.rope_scaling.kind
        _require(
            scaling is RopeScalingKind.none or (self.kind is not ModelKind.vit and kind != "memory"),
            f"model.rope_scaling.kind={scaling.value} has no use with model.kind=vit or model.attention.kind=memory: "
            "leave it out",
        )
        for key in ("num_kv_heads", "head_dim"):
            _require(
                kind != "latent" or getattr(self, key) is None,
                f"model.{key}={getattr(self, key)} has no use with model.attention.kind=latent, whose heads have "
                "widths of their own: leave it out",
            )

    def _settle_vision(self) -> None:
        is_vit = self.kind is ModelKind.vit
        _require(
            is_vit or self.vision is None,
            f"model.vision has no use with model.kind={self.kind.value}: add model.kind=vit",
        )
        if not is_vit:
            return
        self.vision = self.vision or VisionConfig()
        for key in fields(self):
            value = getattr(self, key.name)
            _require(
                key.name not in ("num_tasks", "max_seq_len", "rope_theta", "tie_embeddings") or value == key.default,
                f"model.{key.name}={value} has no use with model.kind=vit: leave it out",
            )

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
        """Width of one attention head's queries and keys."""
        if self.attention.nope_dim is not None and self.attention.rope_dim is not None:  # kind=latent
            return self.attention.nope_dim + self.attention.rope_dim
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """The part of `key_dim` that RoPE rotates."""
        return self.key_dim if self.attention.rope_dim is None else self.attention.rope_dim

    @property
    def _moe_blocks(self) -> range:
        blocks = range(self.moe.every - 1, self.num_layers, self.moe.every)
        return blocks if self.moe.last is None else blocks[-self.moe.last :]

    @property
    def experts_by_block(self) -> list[int]:
        """Number of experts of every block, in order; 0 for a dense block."""
        counts = [0] * self.num_layers
        blocks = self._moe_blocks
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
