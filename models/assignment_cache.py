"""Assignments that repeat from epoch to epoch, in place of a router (DynaMoE, Kossmann 2022).

With a fixed data set a layer soon sends most tokens of a sample to the experts of the epoch before. The cache of a
layer remembers every sample's assignments and keeps a moving average of how many repeat. While that is at least the
trigger, the layer follows the plans of earlier epochs: no router, no exchange of counts or assignments, and the
combine weights as they were. Regular checks route live again.

All that decides is known to all ranks alike: sums over the world at the end of a step, and which micro-batches have
come before. So all ranks turn at the same step, and nothing is restarted or regrouped.

Shapes: N tokens of the micro-batch, K experts for each token.
"""

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from twohop.comm import Planned
from twohop.models.config import AssignmentCacheConfig
from twohop.models.routers import TokenInfo

SMOOTHING = 0.9  # of the moving average of agreement: the part that stays at a step
Stats = TypeVar("Stats")


class Agreement(NamedTuple):
    """How a micro-batch compares with the last time that its samples came; int64 scalars."""

    repeated: Tensor  # assignments that are as they were
    compared: Tensor  # assignments of samples that came before


class AssignmentCache(Generic[Stats]):
    """The memory of one layer on one rank.

    Holds 2 bytes for each assignment of every sample that this rank has seen (4 with more than 32,768 experts) and,
    while the trigger is passed, a plan for each of its micro-batches, at most `max_plans`.
    """

    def __init__(self, config: AssignmentCacheConfig, num_experts: int) -> None:
        self.config = config
        self.agreement = 0.0  # moving average
        self.in_use = False  # the agreement has passed the trigger
        self._id_type = torch.int16 if num_experts <= 2**15 else torch.int32
        self._steps = 0  # since it is in use
        self._has_room = True
        self._ids: dict[int, Tensor] = {}  # sample -> its assignments
        self._plans: dict[tuple[int, ...], tuple[Planned, Stats]] = {}  # samples of a micro-batch -> how it went

    def find(self, samples: tuple[int, ...]) -> tuple[Planned, Stats] | None:
        """The plan of this micro-batch, and what its layer said of it; None if it shall be routed live."""
        checks = (self._steps + 1) % self.config.check_every == 0
        return self._plans.get(samples) if self.in_use and not checks else None

    def compare(self, samples: tuple[int, ...], about: TokenInfo, ids_NK: Tensor) -> Agreement:
        """Compare live assignments with those that were remembered, and remember them instead."""
        ids_NK = ids_NK.to(self._id_type)
        lengths = [len(ids_NK) // len(samples)] * len(samples) if about.length_B is None else about.length_B.tolist()
        repeated, compared = [], 0
        for sample, now_TK in zip(samples, ids_NK.split(lengths), strict=True):
            before_TK = self._ids.get(sample)
            if before_TK is not None and before_TK.shape == now_TK.shape:
                repeated.append((now_TK.unsqueeze(2) == before_TK.unsqueeze(1)).any(2).sum())
                compared += now_TK.numel()
            self._ids[sample] = now_TK.clone()
        total = torch.stack(repeated).sum() if repeated else torch.zeros((), dtype=torch.int64, device=ids_NK.device)
        return Agreement(total, torch.full_like(total, compared))

    def keep(self, samples: tuple[int, ...], planned: Planned, stats: Stats) -> None:
        """Keep the plan of a micro-batch that was routed live, in place of an older one."""
        if self.in_use and (self._has_room or samples in self._plans):
            self._plans[samples] = (planned.kept(), stats)

    def after_step(self, repeated: float, compared: float) -> None:
        """Learn, after an optimizer step, how many assignments of the global batch repeated; the same on all ranks."""
        limit = self.config.max_plans
        self._has_room = limit is None or len(self._plans) < limit
        self._steps += 1
        if compared == 0:  # no sample came before, or all were carried by their plans
            return
        self.agreement = SMOOTHING * self.agreement + (1 - SMOOTHING) * repeated / compared
        passed = self.agreement >= self.config.trigger
        if passed != self.in_use:
            self.in_use, self._steps = passed, 0
            self._plans.clear()  # what is found stale is not used again
