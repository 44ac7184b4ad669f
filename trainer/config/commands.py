"""Everything that a command needs."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from twohop.models.config import ModelConfig
from twohop.trainer.config.checks import listed, require
from twohop.trainer.config.cluster import ClusterConfig
from twohop.trainer.config.comm import CommConfig
from twohop.trainer.config.data import DataConfig
from twohop.trainer.config.placement import PlacementConfig
from twohop.trainer.config.running import (
    CheckpointConfig,
    EvalConfig,
    GenerateConfig,
    LaunchConfig,
    RunConfig,
)
from twohop.trainer.config.seeing import MetricsConfig, ProfileConfig, TrackerConfig
from twohop.trainer.config.training import (
    DistillConfig,
    EngineConfig,
    InitConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)


@dataclass
class Config:
    """Everything `twohop train` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    resume: str | None = None  # null | auto | a run folder
    optimized_metric: str = "valid_loss"  # of summary.json: what a sweeper gets to know of a run
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("valid_loss", "valid_perplexity", "valid_accuracy", "train_loss", "training_seconds")
        require(
            self.optimized_metric in known,
            f"optimized_metric={self.optimized_metric}: unknown; use one of {', '.join(known)}",
        )


@dataclass
class SubmitConfig(Config):
    """Everything `twohop submit` needs: a run, and what to do with the job that trains it."""

    dry_run: bool = False  # show the job and hand in nothing
    out: str | None = None  # a file to keep it in, too


class TensorType(Enum):
    """The type of exported weights."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class ExportConfig(Config):
    """Everything `twohop export` needs: a stored run, and what to make of its model."""

    format: str = "hf"
    out: str | None = None  # the folder to write
    dtype: TensorType = TensorType.fp32
    shard_mib: float = 4096.0  # hf: size of a safetensors file, at most
    task: str | None = None  # task: which of the run's tasks to cut out
    experts: Any = None  # pruned: how many experts stay in each MoE layer, or one number for all. A list once validated
    merge: bool = False  # pruned: average the other experts into those that stay
    bits: int = 8  # quantized: of an expert's weight, 8 or 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shard_mib > 0, f"shard_mib={self.shard_mib}: use a positive number of MiB")
        require(
            self.format != "task" or self.task is not None,
            "format=task needs to know which of the run's tasks to cut out: add task=NAME",
        )
        self.experts = listed(self.experts, int, "experts", "a number, or a list with one for each MoE layer")
        require(self.format != "pruned" or bool(self.experts), "experts is not set: say how many of them stay")
        require(self.bits in (4, 8), f"bits={self.bits}: use 8 or 4")
        users = {"shard_mib": "hf", "task": "task", "experts": "pruned", "merge": "pruned", "bits": "quantized"}
        for key, format in users.items():
            unset = [] if key == "experts" else getattr(type(self), key)
            value = getattr(self, key)
            require(
                self.format == format or value == unset,
                f"{key}={value} has no use with format={self.format}: add format={format}, or leave it out",
            )


@dataclass
class PrepareConfig:
    """Everything `twohop prepare` needs."""

    data: DataConfig = field(default_factory=DataConfig)
    out: str | None = None  # the folder of token files to write; null: data.cache_dir, where training finds it


@dataclass
class BenchConfig:
    """Everything `twohop bench dispatch` needs: a grid of sizes, each carried in every way."""

    tokens: list[int] = field(default_factory=lambda: [64, 512, 2048])  # of each rank
    top_k: list[int] = field(default_factory=lambda: [1, 2, 8])
    dim: list[int] = field(default_factory=lambda: [512])
    experts: int = 64
    algorithms: list[str] = field(default_factory=lambda: ["flat", "hierarchical", "dedup"])
    chunks: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    backward: bool = False  # time forward and backward instead of forward alone
    repeats: int = 5
    ranks_per_node: int | None = None  # null: from torchrun; a number emulates nodes on one host
    cost_file: str | None = None  # predict by this model; null: probe first
    save_cost_file: str | None = None  # where to keep the model, for comm.cost_file
    json: str | None = None  # where to write all measurements
    timeout_s: float = 120.0
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def __post_init__(self) -> None:
        for key in ("tokens", "top_k", "dim", "algorithms", "chunks"):
            require(bool(getattr(self, key)), f"{key}=[]: name at least one value")
        for key in ("tokens", "top_k", "dim", "chunks"):
            for value in getattr(self, key):
                require(value >= 1, f"{key} contains {value}: use positive numbers")
        require(self.repeats >= 1, f"repeats={self.repeats}: use a positive number")
        require(self.timeout_s > 0, f"timeout_s={self.timeout_s}: use a positive number of seconds")
        require(
            max(self.top_k) <= self.experts,
            f"top_k={max(self.top_k)} is more than the {self.experts} experts: lower it or raise experts",
        )
