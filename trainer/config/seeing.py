"""What a run shows of itself."""

from dataclasses import dataclass, fields

from twohop.trainer.config.checks import require, require_at_least


@dataclass
class MetricsConfig:
    """Numbers of a step in metrics.jsonl."""

    # Peak of one accelerator, in 10^12 operations a second at engine.precision, for the utilisation `mfu`; null: from a
    # table of accelerators, or no utilisation where it does not know this one.
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"metrics.peak_tflops={self.peak_tflops}: use a positive number, or null for a known accelerator",
        )


@dataclass
class ProfileConfig:
    """A trace of some steps by torch.profiler, in the run folder."""

    enabled: bool = False
    skip: int = 2  # steps of this start of the run that come before; the first ones are slower than the rest
    steps: int = 2
    every_rank: bool = False  # a trace of each rank; false: of rank 0 alone

    def __post_init__(self) -> None:
        require_at_least(1, "profile", self, "skip", "steps")
        for field in fields(self):
            value = getattr(self, field.name)
            require(
                self.enabled or value == field.default,
                f"profile.{field.name}={value} has no use without a profile: add profile=true, or leave it out",
            )


@dataclass
class TrackerConfig:
    """Experiment trackers beside metrics.jsonl: none, wandb or tensorboard."""

    name: str = "none"
    project: str = "twohop"  # wandb
    mode: str = "offline"  # wandb: offline | online | disabled
    group: str | None = None  # wandb; null: the jobs of a sweep are one group

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            require(
                self.name != "tensorboard" or value == field.default,
                f"tracker.{field.name}={value} has no use with tracker=tensorboard: leave it out",
            )
