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
    keep_every: int | None = None  # those of every so many steps are never deleted; null: all but the newest are
    asynchronous: bool = False  # train on while a copy in host memory is being written

    def __post_init__(self) -> None:
        require_at_least(0, "checkpoint", self, "every")
        require_at_least(1, "checkpoint", self, "keep")
        if self.keep_every is not None:
            require_at_least(1, "checkpoint", self, "keep_every")
            require(
                self.every > 0 and self.keep_every % self.every == 0,
                f"checkpoint.keep_every={self.keep_every} is no multiple of checkpoint.every={self.every}, so there "
                "would be no checkpoint to keep: change one of them",
            )


@dataclass
class LaunchConfig:
    """Worker processes that `twohop train` starts itself; ignored under torchrun."""

    nproc: int = 1
    omp_threads: int = 1  # OMP_NUM_THREADS of each worker
    port: int | None = None  # rendezvous port; null: a free one
    grace_s: float = 120.0  # from SIGTERM or SIGUSR1 to SIGKILL: a step, an evaluation if one is due, a checkpoint

    def __post_init__(self) -> None:
        require_at_least(1, "launch", self, "nproc", "omp_threads")
        require(self.grace_s > 0, f"launch.grace_s={self.grace_s}: use a positive number of seconds")
        require(
            self.port is None or 1 <= self.port <= 65535,
            f"launch.port={self.port}: use a port between 1 and 65535, or null for a free one",
        )


@dataclass
class RunConfig:
    """The run folder: root/name/timestamp, or `dir` if it is given."""

    root: str = "runs"
    name: str = "${model.name}"
    dir: str | None = None
