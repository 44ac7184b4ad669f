"""What happens around the training steps."""

from dataclasses import dataclass

from twohop.trainer.config.checks import require, require_at_least


@dataclass
class EvalConfig:
    """Validation."""

    every: int = 100  # steps; 0: only at the end
    batches: int = 8  # global batches an evaluation; 0: the whole validation split
    exit_confidence: float | None = None  # a token leaves after the block where the head is surer than this; null: none
    expert_bits: int | None = None  # `evaluate` rounds the experts' weights to 8 or 4 bits; null: as they are

    def __post_init__(self) -> None:
        require_at_least(0, "eval", self, "every", "batches")
        require(self.expert_bits in (None, 4, 8), f"eval.expert_bits={self.expert_bits}: use 8, 4 or null")
        require(
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
        require(self.prompt != "", "generate.prompt is empty: give the model at least one character to go on")
        require_at_least(0, "generate", self, "max_new_tokens", "temperature")
        require(
            self.top_k is None or self.top_k >= 1,
            f"generate.top_k={self.top_k}: use 1 or more, or null for every token",
        )


@dataclass
class CheckpointConfig:
    """Saving and keeping."""

    every: int = 100  # steps; 0: only at the end
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self) -> None:
        require_at_least(0, "checkpoint", self, "every")
        require_at_least(1, "checkpoint", self, "keep")


@dataclass
class LaunchConfig:
    """Worker processes that `twohop train` starts itself; ignored under torchrun."""

    nproc: int = 1
    omp_threads: int = 1  # OMP_NUM_THREADS of each worker
    port: int | None = None  # rendezvous port; null: a free one

    def __post_init__(self) -> None:
        require_at_least(1, "launch", self, "nproc", "omp_threads")
        require(
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
