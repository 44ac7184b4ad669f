"""The whole configuration as typed, validated dataclasses; the YAML groups in configs/ fill them.

Hydra composes the YAML over these schemas, `OmegaConf.to_object` turns the result into real objects, and
every `__post_init__` then refuses an impossible value with a `ValueError` that names key, value and cure.
Imports no torch, so that `--help` answers at once.
"""

from dataclasses import dataclass, field
from enum import Enum

from twohop.models.config import ModelConfig


class Precision(Enum):
    """`fp32`, or `bf16`: autocast of forward and backward over fp32 parameters."""

    fp32 = "fp32"
    bf16 = "bf16"


class DecayShape(Enum):
    """Learning-rate schedule after warm-up: cosine decay, or warm-up–stable–decay (WSD)."""

    cosine = "cosine"
    wsd = "wsd"


class TokenizerKind(Enum):
    """`bytes`: one token a byte; `bpe`: trained on the corpus; `file`: any tokenizer.json."""

    bytes = "bytes"
    bpe = "bpe"
    file = "file"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass
class CommConfig:
    """How tokens travel to their experts."""

    dispatcher: str = "dedup"  # flat | hierarchical | dedup
    ranks_per_node: int | None = None  # null: from torchrun; a number emulates nodes on one host
    # One EP size for all MoE layers, one for each, or null: EP = min(experts, world) for each layer.
    ep_size: list[int] = field(default_factory=list)  # [] = null
    init_timeout_s: float = 300.0
    timeout_s: float = 120.0  # deadline of every wait during training

    def __post_init__(self) -> None:
        for key in ("init_timeout_s", "timeout_s"):
            value = getattr(self, key)
            _require(value > 0, f"comm.{key}={value}: use a positive number of seconds")
        _require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            f"comm.ranks_per_node={self.ranks_per_node}: use a positive number, or null for torchrun's value",
        )
        for size in self.ep_size:
            _require(size >= 1, f"comm.ep_size={self.ep_size}: an expert-parallel size is at least 1")


@dataclass
class TokenizerConfig:
    """Text to token ids."""

    kind: TokenizerKind = TokenizerKind.bytes
    vocab_size: int = 4096  # of a BPE that is trained
    file: str | None = None  # a tokenizer.json, for kind=file


@dataclass
class DataConfig:
    """Where the text comes from. `source`: stdlib, text or tokens."""

    source: str = "stdlib"
    files: list[str] = field(default_factory=list)  # text: files, folders or globs; tokens: a prepared folder
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    valid_fraction: float = 0.05  # of the files (of the bytes, if there is only one file)
    max_mib: float | None = None  # use at most this much text
    cache_dir: str = "~/.cache/twohop"  # token files are kept here, named by a fingerprint of their sources


@dataclass
class EngineConfig:
    """What parallelism does to parameters and gradients."""

    name: str = "ddp"
    precision: Precision = Precision.fp32


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


@dataclass
class ScheduleConfig:
    """Learning rate as a fraction of optim.lr."""

    shape: DecayShape = DecayShape.cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # wsd: the last part of the run, which decays
    final_fraction: float = 0.1  # the learning rate at the end ÷ optim.lr


@dataclass
class TrainConfig:
    """Length and batch of the run. World size changes accumulation, never the micro-batch."""

    steps: int = 300
    seq_len: int = 256
    global_batch: int = 16  # sequences a step
    micro_batch: int = 4  # sequences a rank pushes through the model at once


@dataclass
class EvalConfig:
    """Validation."""

    every: int = 100  # steps; 0: only at the end
    batches: int = 8  # global batches an evaluation; 0: the whole validation split


@dataclass
class GenerateConfig:
    """Sampling of text."""

    prompt: str = "def "
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 0


@dataclass
class CheckpointConfig:
    """Saving and keeping."""

    every: int = 100  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept


@dataclass
class LaunchConfig:
    """Worker processes that `twohop train` starts itself; ignored under torchrun or SLURM."""

    nproc: int = 1
    omp_threads: int = 1  # OMP_NUM_THREADS of each worker
    port: int | None = None  # rendezvous port; null: a free one


@dataclass
class TrackerConfig:
    """Experiment trackers beside metrics.jsonl: none or wandb."""

    name: str = "none"
    project: str = "twohop"
    mode: str = "offline"  # wandb: offline | online | disabled
    group: str | None = None


@dataclass
class RunConfig:
    """The run folder: root/name/timestamp, or `dir` if it is given."""

    root: str = "runs"
    name: str = "${model.name}"
    dir: str | None = None


@dataclass
class Config:
    """Everything `twohop train` needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    resume: str | None = None  # null | auto | a run folder
    seed: int = 0
