"""The whole configuration as typed, validated dataclasses; the YAML groups in configs/ fill them.

Hydra composes the YAML over these schemas, `OmegaConf.to_object` turns the result into real objects, and
every `__post_init__` then refuses an impossible value with a `ValueError` that names key, value and cure.
Imports no torch, so that `--help` answers at once.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from twohop.comm.wiring import Wires
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


class DataOrder(Enum):
    """What an epoch shuffles: `samples`, or whole global `batches` that are put together once and come again."""

    samples = "samples"
    batches = "batches"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_at_least(bound: float, group: str, config: object, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(value >= bound, f"{group}.{key}={value}: use {bound} or more")


def _listed(value: Any, kind: type, key: str, wanted: str) -> list:
    """A list of `kind` from null, one value or a list: what a person types for one thing or for many."""
    items = [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
    right = all(isinstance(item, kind) and not isinstance(item, bool) for item in items)
    _require(right, f"{key}={value}: use {wanted}")
    return items


@dataclass
class CommConfig:
    """How tokens travel to their experts."""

    dispatcher: str = "dedup"  # flat | hierarchical | dedup | auto
    chunks: int = 1  # parts of the tokens whose hops and experts overlap; auto chooses by itself
    wire: Wires = field(default_factory=Wires)
    auto_wires: list[str] = field(default_factory=list)  # formats that auto may choose between nodes; []: keeps wire
    cost_file: str | None = None  # auto: predict by this model; null: probe the network at start-up
    ranks_per_node: int | None = None  # null: from torchrun; a number emulates nodes on one host
    # One size for all MoE layers, or a list with one for each; null: the largest that divides a layer's experts and
    # the world, which is min(experts, world) for powers of two. Always a list once validated, empty for null.
    ep_size: Any = None
    init_timeout_s: float = 300.0
    timeout_s: float = 120.0  # deadline of every wait during training

    def __post_init__(self) -> None:
        for key in ("init_timeout_s", "timeout_s"):
            value = getattr(self, key)
            _require(value > 0, f"comm.{key}={value}: use a positive number of seconds")
        _require(self.chunks >= 1, f"comm.chunks={self.chunks}: use 1 for no overlap, or more")
        for key in ("auto_wires", "cost_file"):
            _require(
                self.dispatcher == "auto" or not getattr(self, key),
                f"comm.{key} has no use with comm.dispatcher={self.dispatcher}: add comm=auto or leave it out",
            )
        _require(
            self.dispatcher != "auto" or self.chunks == 1,
            f"comm.chunks={self.chunks} has no use with comm=auto, which chooses: leave it out",
        )
        _require(
            self.ranks_per_node is None or self.ranks_per_node >= 1,
            f"comm.ranks_per_node={self.ranks_per_node}: use a positive number, or null for torchrun's value",
        )
        wanted = "null, a whole number of ranks, or a list with one for each MoE layer"
        self.ep_size = _listed(self.ep_size, int, "comm.ep_size", wanted)
        for size in self.ep_size:
            _require(size >= 1, f"comm.ep_size={self.ep_size}: an expert-parallel size is at least 1")

    def ep_sizes(self, experts_by_layer: list[int], world_size: int) -> list[int]:
        """EP size of each MoE layer, given the layers' expert counts; `validate` has seen that they fit."""
        if len(self.ep_size) == 1:
            return self.ep_size * len(experts_by_layer)
        return self.ep_size or [math.gcd(experts, world_size) for experts in experts_by_layer]


@dataclass
class TokenizerConfig:
    """Text to token ids."""

    kind: TokenizerKind = TokenizerKind.bytes
    vocab_size: int = 4096  # of a BPE that is trained
    file: str | None = None  # a tokenizer.json, for kind=file

    def __post_init__(self) -> None:
        if self.kind is TokenizerKind.file:
            _require(self.file is not None, "data.tokenizer.file is not set: kind=file needs a tokenizer.json")
        else:
            _require(
                self.file is None,
                f"data.tokenizer.file={self.file} has no use with kind={self.kind.value}: add data.tokenizer.kind=file",
            )


@dataclass
class MultitaskConfig:
    """The tasks of data=multitask: their names in `twohop.trainer.data.multitask`, and how much data each has."""

    tasks: list[str] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)  # the part of the training lines that each task has; []: all
    temperature: float = 1.0  # τ: a task of n pairs is drawn in proportion to n^(1/τ); 1 leaves the sizes as they are

    def __post_init__(self) -> None:
        tasks, sizes = self.tasks, self.sizes
        _require(
            bool(tasks) and len(set(tasks)) == len(tasks),
            f"data.multitask.tasks={tasks}: name one task or more, each once",
        )
        _require(
            len(sizes) in (0, len(tasks)) and all(0 < size <= 1 for size in sizes),
            f"data.multitask.sizes={sizes}: list a number in (0, 1] for each of the {len(tasks)} tasks, or nothing",
        )
        _require_at_least(1, "data.multitask", self, "temperature")


@dataclass
class DataConfig:
    """Where samples come from. `source`: stdlib, text or tokens; multitask, of stdlib's text or `files`; digits."""

    source: str = "stdlib"
    files: Any = None  # text: files, folders or globs, one or a list; tokens: a prepared folder. A list once validated
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    order: DataOrder = DataOrder.samples  # batches: the samples that fill no last global batch are never used
    valid_fraction: float = 0.05  # of the files (of the bytes, if there is only one file), or of the images
    max_mib: float | None = None  # use at most this much text
    cache_dir: str = "~/.cache/twohop"  # token files are kept here, named by a fingerprint of their sources
    multitask: MultitaskConfig | None = None

    def __post_init__(self) -> None:
        self.files = _listed(self.files, str, "data.files", "a path, or a list of paths")
        _require(
            0 < self.valid_fraction < 1,
            f"data.valid_fraction={self.valid_fraction}: use a value between 0 and 1, for example 0.05",
        )
        _require(
            self.max_mib is None or self.max_mib > 0,
            f"data.max_mib={self.max_mib}: use a positive number of MiB, or null for all text",
        )
        _require(
            self.multitask is None or self.source == "multitask",
            f"data.multitask has no use with data.source={self.source}: add data=multitask or leave it out",
        )
        _require(
            self.multitask is not None or self.source != "multitask",
            "data.multitask is not set: data.source=multitask needs its tasks, as data=multitask has them",
        )


@dataclass
class EngineConfig:
    """What parallelism does to parameters and gradients."""

    name: str = "ddp"
    precision: Precision = Precision.fp32
    reshard_after_forward: bool = True  # fsdp: free gathered parameters until backward; false: faster, more memory


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

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr}: use a positive learning rate")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas}: use two values in [0, 1)",
        )
        _require(self.eps > 0, f"optim.eps={self.eps}: use a positive number")
        _require_at_least(0, "optim", self, "weight_decay", "expert_lr_scale")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            f"optim.clip_norm={self.clip_norm}: use a positive norm, or null for no clipping",
        )


@dataclass
class ScheduleConfig:
    """Learning rate as a fraction of optim.lr."""

    shape: DecayShape = DecayShape.cosine
    warmup_steps: int = 20
    decay_fraction: float = 0.2  # wsd: the last part of the run, which decays
    final_fraction: float = 0.1  # the learning rate at the end ÷ optim.lr

    def __post_init__(self) -> None:
        _require_at_least(0, "schedule", self, "warmup_steps")
        for key in ("decay_fraction", "final_fraction"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"schedule.{key}={value}: use a fraction between 0 and 1")


@dataclass
class TrainConfig:
    """Length and batch of the run. World size changes accumulation, never the micro-batch."""

    steps: int = 300
    seq_len: int = 256
    global_batch: int = 16  # sequences a step
    micro_batch: int = 4  # sequences a rank pushes through the model at once

    def __post_init__(self) -> None:
        _require_at_least(1, "train", self, "steps", "seq_len", "global_batch", "micro_batch")


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
        _require(self.teacher != "", "distill.teacher is empty: name the run folder of a trained model")
        _require_at_least(0, "distill", self, "weight", "hint_weight")
        _require(self.temperature > 0, f"distill.temperature={self.temperature}: use a positive number")
        _require(0 < self.until <= 1, f"distill.until={self.until}: use a part of the steps in (0, 1]")
        _require(
            len(self.hint_blocks) in (0, 2) and all(block >= 1 for block in self.hint_blocks),
            f"distill.hint_blocks={self.hint_blocks}: use [teacher's block, student's block], counted from 1, or []",
        )
        _require(
            bool(self.hint_blocks) or self.hint_weight == 1,
            f"distill.hint_weight={self.hint_weight} has no use without distill.hint_blocks: set it or leave it out",
        )
        if self.teacher is None:
            for key, default in (("weight", 1), ("temperature", 1), ("until", 2 / 3), ("hint_blocks", [])):
                value = getattr(self, key)
                _require(
                    value == default,
                    f"distill.{key}={value} has no use without distill.teacher: name a run folder, or leave it out",
                )


@dataclass
class EvalConfig:
    """Validation."""

    every: int = 100  # steps; 0: only at the end
    batches: int = 8  # global batches an evaluation; 0: the whole validation split
    exit_confidence: float | None = None  # a token leaves after the block where the head is surer than this; null: none
    expert_bits: int | None = None  # `evaluate` rounds the experts' weights to 8 or 4 bits; null: as they are

    def __post_init__(self) -> None:
        _require_at_least(0, "eval", self, "every", "batches")
        _require(self.expert_bits in (None, 4, 8), f"eval.expert_bits={self.expert_bits}: use 8, 4 or null")
        _require(
            self.exit_confidence is None or 0 <= self.exit_confidence < 1,
            f"eval.exit_confidence={self.exit_confidence}: use a probability in [0, 1), or null for the whole model",
        )


@dataclass
class GenerateConfig:
    """Sampling of text."""

    prompt: str = "def "
    task: str | None = None  # of an encoder-decoder: what to make of the prompt; it takes the most probable tokens
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 50
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.prompt != "", "generate.prompt is empty: give the model at least one character to go on")
        _require_at_least(0, "generate", self, "max_new_tokens", "temperature")
        _require(
            self.top_k is None or self.top_k >= 1,
            f"generate.top_k={self.top_k}: use 1 or more, or null for every token",
        )


@dataclass
class CheckpointConfig:
    """Saving and keeping."""

    every: int = 100  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        _require_at_least(0, "checkpoint", self, "every")
        _require_at_least(1, "checkpoint", self, "keep")


@dataclass
class LaunchConfig:
    """Worker processes that `twohop train` starts itself; ignored under torchrun."""

    nproc: int = 1
    omp_threads: int = 1  # OMP_NUM_THREADS of each worker
    port: int | None = None  # rendezvous port; null: a free one

    def __post_init__(self) -> None:
        _require_at_least(1, "launch", self, "nproc", "omp_threads")
        _require(
            self.port is None or 1 <= self.port <= 65535,
            f"launch.port={self.port}: use a port between 1 and 65535, or null for a free one",
        )


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
class InitConfig:
    """Where the first weights come from; both null: random ones of the seed."""

    from_hf: str | None = None  # a folder that transformers' save_pretrained has written
    upcycle_from: str | None = None  # a dense run, or such a folder of a dense model: its MLP becomes every expert

    def __post_init__(self) -> None:
        _require(
            self.from_hf is None or self.upcycle_from is None,
            f"init.from_hf={self.from_hf} and init.upcycle_from={self.upcycle_from}: weights come from one of them",
        )


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
    distill: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    resume: str | None = None  # null | auto | a run folder
    seed: int = 0


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
        _require(self.shard_mib > 0, f"shard_mib={self.shard_mib}: use a positive number of MiB")
        _require(
            self.format != "task" or self.task is not None,
            "format=task needs to know which of the run's tasks to cut out: add task=NAME",
        )
        self.experts = _listed(self.experts, int, "experts", "a number, or a list with one for each MoE layer")
        _require(self.format != "pruned" or bool(self.experts), "experts is not set: say how many of them stay")
        _require(self.bits in (4, 8), f"bits={self.bits}: use 8 or 4")
        users = {"shard_mib": "hf", "task": "task", "experts": "pruned", "merge": "pruned", "bits": "quantized"}
        for key, format in users.items():
            unset = [] if key == "experts" else getattr(type(self), key)
            value = getattr(self, key)
            _require(
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
            _require(bool(getattr(self, key)), f"{key}=[]: name at least one value")
        for key in ("tokens", "top_k", "dim", "chunks"):
            for value in getattr(self, key):
                _require(value >= 1, f"{key} contains {value}: use positive numbers")
        _require(self.repeats >= 1, f"repeats={self.repeats}: use a positive number")
        _require(self.timeout_s > 0, f"timeout_s={self.timeout_s}: use a positive number of seconds")
        _require(
            max(self.top_k) <= self.experts,
            f"top_k={max(self.top_k)} is more than the {self.experts} experts: lower it or raise experts",
        )
