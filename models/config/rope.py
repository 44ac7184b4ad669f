"""How rotary positions are stretched to a longer context than that of the training. Imports no torch."""

import math
from dataclasses import dataclass, fields
from enum import Enum


class RopeScalingKind(Enum):
    """`linear` (Chen 2023), `llama3` (Llama 3.1), `yarn` (Peng 2023; DeepSeek-V3); `none`: as trained."""

    none = "none"
    linear = "linear"
    llama3 = "llama3"
    yarn = "yarn"


_USERS = {
    "factor": ("linear", "llama3", "yarn"),
    "original_max_seq_len": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "beta_fast": ("yarn",),
    "beta_slow": ("yarn",),
    "mscale": ("yarn",),
    "mscale_all_dim": ("yarn",),
}


@dataclass
class RopeScaling:
    """An option that the kind does not have is refused."""

    kind: RopeScalingKind = RopeScalingKind.none
    factor: float = 1.0  # the new length of the context ÷ the original one
    original_max_seq_len: int | None = None  # llama3, yarn: the context that the frequencies were trained with
    low_freq_factor: float = 1.0  # llama3: pairs with fewer turns than this over that context are slowed wholly
    high_freq_factor: float = 4.0  # llama3: pairs with more turns than this are not slowed
    beta_fast: float = 32.0  # yarn: the same, for more
    beta_slow: float = 1.0  # yarn: and for fewer
    # yarn: with one of them 0, rotated queries and keys grow by 0.1 ln(factor) + 1. Else by 0.1 mscale ln(factor) + 1,
    # divided by the same of mscale_all_dim, which makes all scores of latent attention grow (DeepSeek-V3 has 1 and 1).
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        key = "model.rope_scaling"
        for option in fields(self):
            value, users = getattr(self, option.name), _USERS.get(option.name, ())
            if users and self.kind.value not in users and value != option.default:
                raise ValueError(
                    f"{key}.{option.name}={value} has no use with kind={self.kind.value}: "
                    f"leave it out, or use kind={' or '.join(users)}"
                )
        if self.factor < 1:
            raise ValueError(f"{key}.factor={self.factor}: use 1 or more")
        if self.kind.value in _USERS["original_max_seq_len"] and (self.original_max_seq_len or 0) < 1:
            raise ValueError(f"{key}.original_max_seq_len={self.original_max_seq_len}: say how long the training's was")
        for high, low in (("high_freq_factor", "low_freq_factor"), ("beta_fast", "beta_slow")):
            if getattr(self, high) <= getattr(self, low) or getattr(self, low) <= 0:
                raise ValueError(
                    f"{key}.{high}={getattr(self, high)}: use more than {low}={getattr(self, low)}, above 0"
                )

    @property
    def rotation_factor(self) -> float:
        """By how much rotated queries and keys grow."""
        if self.kind is not RopeScalingKind.yarn:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def score_factor(self) -> float:
        """By how much all scores of latent attention grow."""
        return self._growth(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _growth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1
