"""What `twohop plan` needs: a model, and a cluster that need not be there."""

from dataclasses import dataclass, field
from typing import Any

from twohop.models.config import ModelConfig, ModelKind
from twohop.trainer.config.checks import listed, require, require_at_least
from twohop.trainer.config.training import Precision, Recompute

GPT2_VOCABULARY = 50257
PLANNED_ENGINES = ("ddp", "fsdp", "zero0", "zero1", "zero2")  # zeroN: deepspeed with engine.zero_stage=N


@dataclass
class HardwareConfig:
    """The cluster. What a data sheet says, and three assumptions about what it leaves out."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "h200"  # a name in `twohop.trainer.plan.hardware.GPUS`
    inter_gbps: float = 400.0  # Gbit/s of one network card, each way
    nics_per_node: int | None = None  # network cards of a node; null: one for each GPU
    latency_us: float = 5.0  # of a message between nodes
    message_us: float = 3.2  # of a rank's processor for each message between nodes
    efficiency: float = 0.5  # of the peak, that matrix products reach
    reserve_gib: float = 4.0  # of each GPU's memory for what is not counted: context, buffers of NCCL, fragments

    def __post_init__(self) -> None:
        require_at_least(1, "cluster", self, "nodes", "gpus_per_node")
        require_at_least(0, "cluster", self, "latency_us", "message_us", "reserve_gib")
        require(self.inter_gbps > 0, f"cluster.inter_gbps={self.inter_gbps}: use a positive rate in Gbit/s")
        require(0 < self.efficiency <= 1, f"cluster.efficiency={self.efficiency}: use a part of the peak in (0, 1]")
        nics = self.nics_per_node
        require(
            nics is None or (1 <= nics <= self.gpus_per_node and self.gpus_per_node % nics == 0),
            f"cluster.nics_per_node={nics}: use a divisor of cluster.gpus_per_node={self.gpus_per_node}, "
            "or null for one a GPU",
        )

    @property
    def world(self) -> int:
        """Ranks: one for each GPU."""
        return self.nodes * self.gpus_per_node


@dataclass
class PlanConfig:
    """Everything `twohop plan` needs. The lists are what it may choose from."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cluster: HardwareConfig = field(default_factory=HardwareConfig)
    seq_len: int | None = None  # null: model.max_seq_len; of images: their patches
    source_len: int | None = None  # tokens of a source, of kind=encoder_decoder; null: seq_len
    global_batch: int = 512  # sequences a step
    precision: Precision = Precision.bf16
    fp8_experts: bool = False  # as engine.fp8_experts
    optimizer: str = "adamw"  # or muon
    vocab_size: int | None = None  # of a model that takes it from its data; null: 50257, as GPT-2, of text
    engines: list[str] = field(default_factory=lambda: list(PLANNED_ENGINES))
    recompute: list[Recompute] = field(default_factory=lambda: list(Recompute))  # as train.recompute
    micro_batches: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    ep_size: Any = None  # of each MoE layer, or one for all; null: any that divides its experts and the world
    rank_load: Any = None  # rows at the busiest rank's experts ÷ the mean, of each MoE layer or one for all; null: 1
    dispatchers: list[str] = field(default_factory=lambda: ["flat", "hierarchical", "dedup"])
    chunks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    wires: list[str] = field(default_factory=lambda: ["fp32", "bf16"])
    cost_file: str | None = None  # predict by this model, which a probe has fitted; null: by the cluster's data
    json: str | None = None  # where to write all that is printed

    def __post_init__(self) -> None:
        require_at_least(1, "plan", self, "global_batch")
        self._check_sequences()
        for key in ("engines", "recompute", "micro_batches", "dispatchers", "chunks", "wires"):
            require(bool(getattr(self, key)), f"{key}=[]: name at least one value")
        for key in ("micro_batches", "chunks"):
            for value in getattr(self, key):
                require(value >= 1, f"{key} contains {value}: use positive numbers")
        require(
            not self.fp8_experts or self.precision is not Precision.fp32,
            "fp8_experts=true has bf16 results, but precision=fp32: use precision=bf16, or leave it out",
        )
        self.ep_size = self._of_layers("ep_size", int, "a whole number of ranks")
        self.rank_load = [float(load) for load in self._of_layers("rank_load", (int, float), "a number from 1 up")]
        require(
            all(load >= 1 for load in self.rank_load),
            f"rank_load={self.rank_load}: the busiest rank has the mean or more: use 1 up",
        )
        sides = [self.model] if self.model.encoder is None else [self.model.encoder_stack, self.model]
        factors = [side.moe.capacity_factor for side in sides]
        require(
            not self.rank_load or any(factor is None or factor > 1 for factor in factors),
            f"rank_load={self.rank_load} has no use with model.moe.capacity_factor={factors[-1]}: no rank gets more "
            "than the mean; leave it out, or use capacity_factor=null",
        )

    def _of_layers(self, key: str, kind: type | tuple[type, ...], what: str) -> list:
        """One for all MoE layers, one for each, or none."""
        values = listed(getattr(self, key), kind, key, f"null, {what}, or a list with one for each MoE layer")
        layers = len(self.model.experts_by_layer)
        require(
            len(values) in (0, 1, layers),
            f"{key}={values} lists {len(values)} layers, but the model has {layers} MoE layers",
        )
        return values

    @property
    def lengths(self) -> tuple[int, int | None]:
        """Tokens of a sequence, and of its source in a model that has one."""
        if self.model.vision is not None:
            return self.model.vision.num_patches, None
        seq_len = self.seq_len or self.model.max_seq_len
        is_pair = self.model.kind is ModelKind.encoder_decoder
        return seq_len, (self.source_len or seq_len) if is_pair else None

    def _check_sequences(self) -> None:
        kind, longest = self.model.kind, self.model.max_seq_len
        with_source = kind is ModelKind.encoder_decoder
        for key, has_use in (("seq_len", kind is not ModelKind.vit), ("source_len", with_source)):
            value = getattr(self, key)
            require(value is None or has_use, f"{key}={value} has no use with model.kind={kind.value}: leave it out")
            require(
                value is None or 1 <= value <= longest,
                f"{key}={value}: use 1 to model.max_seq_len={longest}, or null",
            )
        is_known = self.model.vocab_size is not None or self.vocab_size is not None
        require(is_known or kind is not ModelKind.vit, "vocab_size=null: set it to the number of the images' classes")
        require(self.vocab_size is None or self.vocab_size >= 1, f"vocab_size={self.vocab_size}: use a positive number")
        if self.vocab_size is None:
            self.vocab_size = GPT2_VOCABULARY
