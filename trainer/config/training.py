"""What is learned from the samples, and how."""

from dataclasses import dataclass, field
from enum import Enum

from twohop.trainer.config.checks import require, require_at_least


class Precision(Enum):
    """`fp32`; `bf16`: autocast of forward and backward over fp32 parameters; `bf16_params`: parameters and gradients in
    bf16, trained through fp32 masters. Routers are fp32 in all of them.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_params = "bf16_params"


class Recompute(Enum):
    """What the backward pass computes again instead of keeping it from the forward pass; each keeps less than the last.

    `none`; `selective`: what is made number by number in attention, dense networks and experts, while their products
    are kept; `networks`: attention, dense networks and experts, all from their inputs, while rows that have travelled
    are kept; `full`: whole blocks from their inputs, with rows travelling again. Routing is kept by all.
    """

    none = "none"
    selective = "selective"
    networks = "networks"
    full = "full"


class DecayShape(Enum):
    """Learning-rate schedule after warm-up: cosine decay, or warm-up–stable–decay (WSD)."""

    cosine = "cosine"
    wsd = "wsd"


@dataclass
class EngineConfig:
    """What parallelism does to parameters and gradients."""

    name: str = "ddp"
    precision: Precision = Precision.fp32
    reshard_after_forward: bool = True  # fsdp: free gathered parameters until backward; false: faster, more memory
    zero_stage: int | None = None  # deepspeed: 0, 1 (moments are shared out) or 2 (so are gradients); null: 1
    fp8_experts: bool = False  # experts' products in fp8 while training; H100 and newer

    def __post_init__(self) -> None:
        for key, engine in (("reshard_after_forward", "fsdp"), ("zero_stage", "deepspeed")):
            value = getattr(self, key)
            require(
                self.name == engine or value == getattr(type(self), key),
                f"engine.{key}={value} has no use with engine={self.name}: add engine={engine}, or leave it out",
            )
        require(
            self.zero_stage != 3,
            "engine.zero_stage=3: DeepSpeed shares out the parameters of its own MoE layers alone; use zero_stage=2, "
            "or engine=fsdp, which shares out parameters too",
        )
        require(self.zero_stage in (None, 0, 1, 2), f"engine.zero_stage={self.zero_stage}: use 0, 1 or 2")
        require(
            not self.fp8_experts or self.precision is not Precision.fp32,
            "engine.fp8_experts=true has bf16 results, but engine.precision=fp32: add engine.precision=bf16",
        )
        if self.name == "deepspeed" and self.zero_stage is None:
            self.zero_stage = 1


@dataclass
class OptimConfig:
    """The optimizer and its parameter groups."""

    name: str = "adamw"
    lr: float = 3e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; norms and biases have none
    expert_lr_scale: float = 1.0  # learning rate of experts ÷ learning rate of the rest
    clip_norm: float | None = 1.0  # global gradient norm; null: no clipping
    fused: bool = True  # AdamW as one pass over the parameters; false: operation by operation (foreach)
    momentum: float | None = None  # muon; null: 0.95

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: use a positive learning rate")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas}: use two values in [0, 1)",
        )
        require(self.eps > 0, f"optim.eps={self.eps}: use a positive number")
        require_at_least(0, "optim", self, "weight_decay", "expert_lr_scale")
        require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: use a positive norm, or null for no clipping",
        )
        require(
            self.momentum is None or self.name == "muon",
            f"optim.momentum={self.momentum} has no use with optim.name={self.name}: add optim=muon, or leave it out",
        )
        if self.name == "muon" and self.momentum is None:
            self.momentum = 0.95
        require(
            self.momentum is None or 0 <= self.momentum < 1, f"optim.momentum={self.momentum}: use a value in [0, 1)"
        )


@dataclass
class ScheduleConfig:
    """Learning rate as a fraction of optim.lr."""

    shape: DecayShape = DecayShape.cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # wsd: the last part of the run, which decays
    final_fraction: float = 0.1  # the learning rate at the end ÷ optim.lr

    def __post_init__(self) -> None:
        require_at_least(0, "schedule", self, "warmup_steps")
        for key in ("decay_fraction", "final_fraction"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"schedule.{key}={value}: use a fraction between 0 and 1")


@dataclass
class TrainConfig:
    """Length and batch of the run. World size changes accumulation, never the micro-batch."""

    steps: int = 300
    seq_len: int = 256
    global_batch: int = 16  # sequences a step
    micro_batch: int = 4  # sequences a rank pushes through the model at once
    recompute: Recompute = Recompute.none  # activation checkpointing
    compile: bool = False  # torch.compile of attention, norms, dense networks and the experts' activation

    def __post_init__(self) -> None:
        require_at_least(1, "train", self, "steps", "seq_len", "global_batch", "micro_batch")
        require(
            not self.compile or self.recompute is not Recompute.selective,
            "train.recompute=selective has no use with train.compile=true, which hides products from it and chooses by "
            "itself what is made again: use recompute=none, networks or full",
        )


@dataclass
class DistillConfig:
    """Training towards a teacher: the loss gets weight · temperature² · KL(teacher ‖ student)."""

    teacher: str | None = None  # the folder of a trained run; null: none
    weight: float = 1.0  # β
    temperature: float = 1.0  # T, by which the logits of both are divided
    until: float = 2 / 3  # the part of the steps after which the teacher leaves (staged); 1: it stays (full)
    # A block of the teacher and one of the student, counted from 1: the student's state there shall be the teacher's.
    hint_blocks: list[int] = field(default_factory=list)
    hint_weight: float = 1.0  # of the mean squared distance

    def __post_init__(self) -> None:
        require(self.teacher != "", "distill.teacher is empty: name the run folder of a trained model")
        require_at_least(0, "distill", self, "weight", "hint_weight")
        require(self.temperature > 0, f"distill.temperature={self.temperature}: use a positive number")
        require(0 < self.until <= 1, f"distill.until={self.until}: use a part of the steps in (0, 1]")
        require(
            len(self.hint_blocks) in (0, 2) and all(block >= 1 for block in self.hint_blocks),
            f"distill.hint_blocks={self.hint_blocks}: use [teacher's block, student's block], counted from 1, or []",
        )
        require(
            bool(self.hint_blocks) or self.hint_weight == 1,
            f"distill.hint_weight={self.hint_weight} has no use without distill.hint_blocks: set it or leave it out",
        )
        if self.teacher is None:
            for key, default in (("weight", 1), ("temperature", 1), ("until", 2 / 3), ("hint_blocks", [])):
                value = getattr(self, key)
                require(
                    value == default,
                    f"distill.{key}={value} has no use without distill.teacher: name a run folder, or leave it out",
                )


@dataclass
class InitConfig:
    """Where the first weights come from; both null: random ones of the seed."""

    from_hf: str | None = None  # a folder that transformers' save_pretrained has written
    upcycle_from: str | None = None  # a dense run, or such a folder of a dense model: its MLP becomes every expert

    def __post_init__(self) -> None:
        require(
            self.from_hf is None or self.upcycle_from is None,
            f"init.from_hf={self.from_hf} and init.upcycle_from={self.upcycle_from}: weights come from one of them",
        )
