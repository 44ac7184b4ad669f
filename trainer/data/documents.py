"""Windows of tokens that keep their documents apart.

Shapes: B windows, T tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from twohop.trainer.data.samples import IGNORED, Batch
from twohop.trainer.data.tokens import TokenWindows

_SEARCH_BLOCK = 1 << 22  # tokens


class DocumentWindows(TokenWindows):
    """`TokenWindows` whose batches say which document each token is of, and in which no document predicts another.

    A window is full of tokens all the same: there is no padding, and a document is cut where a window ends.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, split: str, end_of_document: int) -> None:
        super().__init__(tokens, seq_len, split)
        blocks = range(0, len(tokens), _SEARCH_BLOCK)
        found = [np.flatnonzero(tokens[at : at + _SEARCH_BLOCK] == end_of_document) + at for at in blocks]
        self._ends = np.concatenate(found)  # places of the tokens that end documents, in order

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`: also document_BT, which numbers the documents of a window from 0."""
        batch = super().batch(numbers)
        target_BT, document_BT = batch.targets.clone(), torch.zeros_like(batch.targets)
        for row, number in enumerate(numbers):
            start = number * self.seq_len
            first, last = np.searchsorted(self._ends, [start, start + self.seq_len])
            ends = torch.from_numpy(self._ends[first:last] - start)
            target_BT[row, ends] = IGNORED
            document_BT[row, ends[ends + 1 < self.seq_len] + 1] = 1
        return Batch({**batch.inputs, "document_BT": document_BT.cumsum(1)}, target_BT)

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`: every token but a window's and a document's first is a target."""
        starts = np.asarray(numbers, dtype=np.int64) * self.seq_len
        ends = np.searchsorted(self._ends, starts + self.seq_len) - np.searchsorted(self._ends, starts)
        return super().num_targets(numbers) - int(ends.sum())

    def _count(self) -> np.ndarray:
        counts = super()._count()
        firsts = self.tokens[self._ends[self._ends + 1 < len(self.tokens)] + 1]
        return counts - np.bincount(firsts, minlength=len(counts))
