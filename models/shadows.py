"""Experts that every rank computes for its own tokens, because very many tokens choose them.

Their weights come to all ranks of the EP group in every pass, and their gradients go back and are added up where the
expert lives: optimizer, checkpoints and engines see nothing of it. Shapes: N tokens of a rank, K experts of a token,
E experts of the layer, H of them with shadows, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twohop.comm import Planned, TokenDispatcher, Topology, TrafficMeter, build_dispatcher
from twohop.comm.exchange import Channel
from twohop.comm.shadow import fetch
from twohop.models.experts import ExpertPass


@dataclass(frozen=True)
class PlannedTwice:
    """Where a rank's assignments go: to the ranks of their experts, or to shadows at home."""

    away: Planned
    home: Planned

    def kept(self) -> "PlannedTwice":
        """See `Planned.kept`."""
        return PlannedTwice(self.away.kept(), self.home.kept())


class Shadows:
    """Carries tokens like the layer's dispatcher, but those of experts with shadows stay where they are.

    Results are the dispatcher's up to the order in which a token's experts are added: those at home come last.
    """

    def __init__(self, slots: Sequence[int], dispatcher: TokenDispatcher, meter: TrafficMeter | None = None) -> None:
        """`slots`: where the experts live among all of the layer, ascending; the same on all ranks."""
        topology, label, clock = dispatcher.topology, dispatcher.label, dispatcher.clock
        self.slots, self.dispatcher = tuple(slots), dispatcher
        self.channel = Channel.make(topology, topology.ep_group, label, meter, "shadows", clock)
        self.at_home = build_dispatcher("flat", Topology.one_process(), len(slots), label=label, clock=clock)
        number_E = torch.full((dispatcher.num_experts,), -1)
        number_E[list(slots)] = torch.arange(len(slots))
        self.number_E = number_E.to(topology.device)  # of a slot among those with shadows; -1: it is not

    def plan(self, x_ND: Tensor, slots_NK: Tensor, weights_NK: Tensor, counts_on_device: bool = False) -> PlannedTwice:
        """As `TokenDispatcher.plan`; every rank of the EP group must call it, and `follow` afterwards."""
        home_NK = torch.where(slots_NK >= 0, self.number_E[slots_NK], -1)
        away_NK = slots_NK.masked_fill(home_NK >= 0, -1)
        away = self.dispatcher.plan(x_ND, away_NK, weights_NK, counts_on_device)
        return PlannedTwice(away, self.at_home.plan(x_ND, home_NK, weights_NK, counts_on_device))

    def follow(
        self, planned: PlannedTwice, x_ND: Tensor, experts: ExpertPass, beside: Callable[[], Any]
    ) -> tuple[Tensor, Any]:
        """As `TokenDispatcher.follow`. Shadows are fetched and at work while the first hop is under way."""

        def beside_and_home() -> tuple[Any, Tensor]:
            output = beside()
            module = experts.experts
            shadows = module.begin(x_ND)
            shadows.open(fetch((module.up, module.down), self.slots, self.channel))
            home_ND, _ = self.at_home.follow(planned.home, x_ND, shadows)
            return output, home_ND

        away_ND, (output, home_ND) = self.dispatcher.follow(planned.away, x_ND, experts, beside_and_home)
        return away_ND + home_ND, output
