"""A dispatcher whose sums know nothing of where experts live: all are formed at home, in the order of the assignments.

Partial sums save rows on the network: one for each rank, or node, in place of one for each of a token's experts. But a
sum of three depends on which two are added first, hence on who lives together.

Shapes: N tokens, D width, K experts per token, C = N·K copies of tokens, R rows at this rank's experts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from twohop.comm.diagnose import announce_failure
from twohop.comm.dispatcher import Dispatched, Planned, TokenDispatcher, check_arguments
from twohop.comm.pipeline import Experts, copies_of, weighed_sums
from twohop.comm.tree import Bag, Spread


@dataclass(frozen=True)
class PlannedCopies(Planned):
    """A plan for N·K copies of tokens, each with one expert and weight 1, and the weights that wait at home."""

    home_weights_NK: torch.Tensor

    def kept(self) -> "PlannedCopies":
        """See `Planned.kept`."""
        weights_NK = self.home_weights_NK.detach()
        return replace(self, plan=self.plan.kept(self.number), weights_NK=None, home_weights_NK=weights_NK)


@dataclass(frozen=True)
class DispatchedCopies(Dispatched):
    """The same, under way."""

    home_weights_NK: torch.Tensor


class SumsAtHome(TokenDispatcher):
    """Carries a copy of a token to each of its experts, and weighs and adds up the K results where the token lives.

    Arguments, results and errors are those of `TokenDispatcher`, but for the last bits of sums; with the fp32 wire no
    bit depends on which experts share a rank or a node. K rows travel for every token, by any route, and are kept.
    """

    @torch.compiler.disable
    def dispatch(
        self, tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> DispatchedCopies:
        """See `TokenDispatcher.dispatch`."""
        dispatched = super().dispatch(*self._apart(tokens_ND, expert_ids_NK, weights_NK))
        return DispatchedCopies(**vars(dispatched), home_weights_NK=weights_NK)

    @torch.compiler.disable
    def combine(self, expert_rows_RD: torch.Tensor, dispatched: Dispatched) -> torch.Tensor:
        """See `TokenDispatcher.combine`; the sum runs over a token's assignments in their order."""
        assert isinstance(dispatched, DispatchedCopies)
        return _together(super().combine(expert_rows_RD, dispatched), dispatched.home_weights_NK)

    @torch.compiler.disable
    def plan(
        self,
        tokens_ND: torch.Tensor,
        expert_ids_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        counts_on_device: bool = False,
    ) -> PlannedCopies:
        """See `TokenDispatcher.plan`."""
        planned = super().plan(*self._apart(tokens_ND, expert_ids_NK, weights_NK), counts_on_device)
        return PlannedCopies(**vars(planned), home_weights_NK=weights_NK)

    @torch.compiler.disable
    def follow(
        self, planned: Planned, tokens_ND: torch.Tensor, experts: Experts, beside: Callable[[], Any] | None = None
    ) -> tuple[torch.Tensor, Any]:
        """See `TokenDispatcher.follow`."""
        assert isinstance(planned, PlannedCopies)
        weights_NK = planned.home_weights_NK
        with announce_failure(self.topology, f"{self.label}, dispatch"):
            if len(tokens_ND) != len(weights_NK):
                raise ValueError(f"the plan is for {len(weights_NK)} tokens, not {len(tokens_ND)}")
        copies_CD = copies_of(tokens_ND, _copying(weights_NK))
        home_CD, output = super().follow(planned, copies_CD, experts, beside)
        return _together(home_CD, weights_NK), output

    def _apart(
        self, tokens_ND: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[C, D], [C, 1] and [C, 1]: a copy of a token for each of its experts, with weight 1."""
        with announce_failure(self.topology, f"{self.label}, dispatch"):
            check_arguments(tokens_ND, expert_ids_NK, weights_NK)
        ones_C1 = torch.ones_like(weights_NK, requires_grad=False).view(-1, 1)
        return copies_of(tokens_ND, _copying(weights_NK)), expert_ids_NK.reshape(-1, 1), ones_C1


def _together(home_CD: torch.Tensor, weights_NK: torch.Tensor) -> torch.Tensor:
    """[N, D]: the weighed sums of each token's copies."""
    wide_C = weights_NK.to(torch.promote_types(weights_NK.dtype, torch.float32)).reshape(-1)
    return weighed_sums(home_CD, wide_C, _copying(weights_NK))


def _copying(like_NK: torch.Tensor) -> Spread:
    """From tokens to their copies."""
    tokens, k = like_NK.shape
    copies_C = torch.arange(tokens * k, device=like_NK.device)
    offsets = torch.arange(0, tokens * k + 1, k, device=like_NK.device)
    return Spread(copies_C // k, (Bag(copies_C, offsets),))
