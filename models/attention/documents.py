"""Several documents in one sequence: who belongs to whom, and the masks that keep them apart.

Shapes: B sequences, T positions, H heads, A head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from twohop.models.attention.masks import MaskMod


class Documents:
    """The documents of a packed batch, as one forward pass sees them: nobody sees another document.

    Positions begin at 0 with every document. Patterns are asked about these, so that a document is treated as if it
    stood alone, also by patterns that look at absolute positions.
    """

    def __init__(self, number_BT: Tensor) -> None:
        """`number_BT`: int64, of the document that a position belongs to; a document's positions stand together."""
        self.number_BT = number_BT
        place_T = torch.arange(number_BT.shape[1], device=number_BT.device)
        is_first_BT = torch.ones_like(number_BT, dtype=torch.bool)
        is_first_BT[:, 1:] = number_BT[:, 1:] != number_BT[:, :-1]
        self.position_BT = place_T - torch.where(is_first_BT, place_T, 0).cummax(1).values
        self._made: dict[Any, Any] = {}

    def within(self, mask: MaskMod | None) -> MaskMod:
        """`mask` inside each document, and nothing between them; None: all of a document see all of it."""

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = self.number_BT[b, q] == self.number_BT[b, k]
            return same if mask is None else same & mask(b, h, self.position_BT[b, q], self.position_BT[b, k])

        return seen

    def once(self, mask: MaskMod | None, make: Callable[[MaskMod], Any]) -> Any:
        """What `make` makes of `within(mask)`, kept for the layers that ask for the same."""
        if mask not in self._made:
            self._made[mask] = make(self.within(mask))
        return self._made[mask]
