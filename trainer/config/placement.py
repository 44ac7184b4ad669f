"""Where experts live."""

from dataclasses import dataclass

from twohop.trainer.config.checks import require, require_at_least


@dataclass
class PlacementConfig:
    """Which rank of its EP group an expert lives on: contiguous, or by measured load: balanced or affinity."""

    name: str = "contiguous"
    shadows: int = 0  # experts of a layer, those with the most tokens, that every rank computes for its own tokens
    every: int = 100  # steps from one look at the load to the next, and a move if it is worth it
    sample: int = 8192  # tokens of all ranks together, the last ones, by which a layer's placement is decided

    def __post_init__(self) -> None:
        require_at_least(0, "placement", self, "shadows")
        require_at_least(1, "placement", self, "every", "sample")
        for key in ("every", "sample"):
            value = getattr(self, key)
            require(
                self.follows_load or value == getattr(PlacementConfig, key),
                f"placement.{key}={value} has no use with placement=contiguous and without shadows: add "
                "placement=affinity or placement.shadows=1, or leave it out",
            )

    @property
    def follows_load(self) -> bool:
        """Whether tokens are looked at."""
        return self.name != "contiguous" or self.shadows > 0
