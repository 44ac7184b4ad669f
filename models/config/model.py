"""The model around its layers: decoder, encoder-decoder or ViT."""

import re
from dataclasses import dataclass, field, fields, replace
from enum import Enum

from twohop.models.config.attention import AttentionConfig
from twohop.models.config.checks import require
from twohop.models.config.moe import MoEConfig
from twohop.models.config.rope import RopeScaling, RopeScalingKind
from twohop.models.layer_counts import expert_counts


class Activation(Enum):
    """The feed-forward non-linearity. `swiglu` has three matrices, `gelu` two."""

    swiglu = "swiglu"
    gelu = "gelu"


class ModelKind(Enum):
    """`decoder`: a causal language model. `encoder_decoder`: from one sequence to another. `vit`: classes of images."""

    decoder = "decoder"
    encoder_decoder = "encoder_decoder"
    vit = "vit"


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
            require(value >= 1, f"model.vision.{key}={value}: use a positive number")
        require(
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
            require(value >= 1, f"model.{key}={value}: use a positive number")
        require(0 <= self.layer_drop < 1, f"model.layer_drop={self.layer_drop}: use a part of the steps in [0, 1)")
        require(
            self.layer_drop == 0 or self.kind is ModelKind.decoder,
            f"model.layer_drop={self.layer_drop} has no use with model.kind={self.kind.value}: leave it out",
        )
        require(
            self.head_dim is not None or self.attention.kind == "latent" or self.dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.dim={self.dim}: "
            "change one of them or set model.head_dim",
        )
        self._check_rope_and_latent()
        require(self.rotary_dim % 2 == 0, f"model.head_dim={self.key_dim} is odd: RoPE rotates pairs, use an even one")
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}",
        )
        wanted = len(self._moe_blocks)
        require(
            self.moe.last in (None, wanted),
            f"model.moe.last={self.moe.last}: model.num_layers={self.num_layers} with model.moe.every={self.moe.every} "
            f"has only {wanted} such blocks: lower last, or use null for all",
        )
        self.moe = replace(self.moe, experts=expert_counts(self.moe.experts, wanted))
        given = len(self.moe.experts)
        require(
            given in (0, 1, wanted),
            f"model.moe.experts lists {given} layers, but model.num_layers={self.num_layers} with "
            f"model.moe.every={self.moe.every} makes {wanted} MoE layers: list {wanted} counts, or one for all",
        )
        require(
            len(self.ffn_dims) in (0, self.num_layers) and all(width >= 1 for width in self.ffn_dims),
            f"model.ffn_dims={self.ffn_dims}: list a positive width for each of the {self.num_layers} blocks, or none",
        )
        is_pair = self.kind is ModelKind.encoder_decoder
        require(
            is_pair or self.encoder is None,
            f"model.encoder has no use with model.kind={self.kind.value}: add model.kind=encoder_decoder",
        )
        if is_pair:
            self._settle_encoder()
        self._settle_vision()

    def _check_rope_and_latent(self) -> None:
        kind, scaling = self.attention.kind, self.rope_scaling.kind
        require(
            scaling is RopeScalingKind.none or (self.kind is not ModelKind.vit and kind != "memory"),
            f"model.rope_scaling.kind={scaling.value} has no use with model.kind=vit or model.attention.kind=memory: "
            "leave it out",
        )
        for key in ("num_kv_heads", "head_dim"):
            require(
                kind != "latent" or getattr(self, key) is None,
                f"model.{key}={getattr(self, key)} has no use with model.attention.kind=latent, whose heads have "
                "widths of their own: leave it out",
            )

    def _settle_vision(self) -> None:
        is_vit = self.kind is ModelKind.vit
        require(
            is_vit or self.vision is None,
            f"model.vision has no use with model.kind={self.kind.value}: add model.kind=vit",
        )
        if not is_vit:
            return
        self.vision = self.vision or VisionConfig()
        for key in fields(self):
            value = getattr(self, key.name)
            require(
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
