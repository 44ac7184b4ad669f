"""Several corpora as one: their samples numbered one corpus after the other.

Shapes: B samples of a batch.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from twohop.trainer.data.samples import Batch, Samples


class Joined:
    """The samples of all parts, which must make batches of one shape. A batch says in `group_B` which part each is of.

    With `weights`, samples are numbered so that each stretch holds the parts by their weights as long as they last.
    """

    def __init__(self, parts: Sequence[Samples], weights: Sequence[float] | None = None) -> None:
        self.parts = parts
        self._first = [
            0,
            *accumulate(len(part) for part in parts),
        ]  # number of each part's first sample; then their sum
        self._order = None
        if weights is not None:
            places = [(np.arange(len(part)) + 0.5) / weight for part, weight in zip(parts, weights, strict=True)]
            self._order = np.argsort(np.concatenate(places), kind="stable")

    def __len__(self) -> int:
        return self._first[-1]

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`."""
        places_by_part: dict[int, list[int]] = {}
        found = [self._find(number) for number in numbers]
        for place, (part, _) in enumerate(found):
            places_by_part.setdefault(part, []).append(place)
        batches, places = [], []
        for part, own_places in places_by_part.items():
            batch = self.parts[part].batch([found[place][1] for place in own_places])
            inputs = {**batch.inputs, "sample_B": batch.inputs["sample_B"] + self._first[part]}
            batches.append(Batch(inputs, batch.targets, torch.full((len(own_places),), part)))
            places += own_places
        back_B = torch.tensor(places).argsort()
        inputs = {name: torch.cat([b.inputs[name] for b in batches])[back_B] for name in batches[0].inputs}
        groups = [b.group_B for b in batches if b.group_B is not None]
        return Batch(inputs, torch.cat([b.targets for b in batches])[back_B], torch.cat(groups)[back_B])

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`."""
        return sum(self.parts[part].num_targets([own]) for part, own in map(self._find, numbers))

    def target_entropy(self) -> float:
        """See `Samples`: the mean over the parts by their numbers of samples, since each can be told by its text."""
        return sum(part.target_entropy() * len(part) for part in self.parts) / len(self)

    def _find(self, number: int) -> tuple[int, int]:
        """The part that a sample is of, and its number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        if self._order is not None:
            number = int(self._order[number])
        part = bisect_right(self._first, number) - 1
        return part, number - self._first[part]
