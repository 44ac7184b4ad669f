"""Windows of tokens from a data set that is read as it comes, for what does not fit on the disk.

Which window has which number depends on the data set and the settings alone: so the position of a run is its step, as
with all data. Bookmarks in the cache only spare a resumed run the reading of what came before.
"""

import json
import os
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from twohop.trainer.data.order import ENDLESS
from twohop.trainer.data.samples import Batch
from twohop.trainer.data.tokenizer import Tokenizer
from twohop.trainer.errors import DataError

_ROWS_AT_ONCE = 32  # tokenised together
_PLAIN_BLOCK = 64  # windows that are read at once where none are shuffled


class Piece(NamedTuple):
    """Tokens of some rows."""

    tokens: np.ndarray
    rows: Any  # the state of the stream before them; None: its beginning


class Lane:
    """A part of a stream that is read by itself: its windows in order, again from the beginning when it ends.

    Args:
        open_rows: the part as an `IterableDataset` of the library, from its beginning.
        texts_of: the texts of these rows that train.
        tokenizer: of the texts.
        seq_len: a window has one token more, which it shares with the next.
        block: windows that are read at once.
        bookmarks: folder of this lane's bookmarks.
    """

    def __init__(
        self,
        open_rows: Callable[[], Any],
        texts_of: Callable[[Any], Generator[str, None, None]],
        tokenizer: Tokenizer,
        seq_len: int,
        block: int,
        bookmarks: Path,
    ) -> None:
        self._open_rows, self._texts_of, self._tokenizer = open_rows, texts_of, tokenizer
        self._seq_len, self._block, self._bookmarks = seq_len, block, bookmarks
        self._number, self._windows = -1, np.zeros(0)  # the block in memory
        self._next = 0  # the block after it
        self._start(None, 0)

    def block(self, number: int) -> np.ndarray:
        """The windows number · block, …: [block, seq_len + 1]."""
        if number != self._number:
            if number < self._next or number > self._next + 1:
                self._go_near(number)
            while self._next <= number:
                self._leave_bookmark()
                self._windows = np.stack([self._window() for _ in range(self._block)])
                self._number, self._next = self._next, self._next + 1
        return self._windows

    def _start(self, rows: Any, block: int, offset: int = 0) -> None:
        """Go to a state of the stream, at which the piece with the first token of a block begins."""
        self._rows = self._open_rows()
        if rows is not None:
            self._rows.load_state_dict(rows)
        self._state, self._next = rows, block
        self._iterate()
        self._pieces: deque[Piece] = deque()
        self._offset = offset  # of the next window in the first piece
        self._is_empty = True  # no text has come yet; a bookmark stands before one

    def _iterate(self) -> None:
        self._texts = self._texts_of(self._rows)
        # The library's readers complain if they are still open when the interpreter ends.
        weakref.finalize(self, self._texts.close)

    def _window(self) -> np.ndarray:
        size = self._seq_len + 1
        while sum(len(piece.tokens) for piece in self._pieces) < self._offset + size:
            self._read()
        parts = [self._pieces[0].tokens[self._offset : self._offset + size]]
        self._offset += self._seq_len
        while self._offset >= len(self._pieces[0].tokens):  # never past the last token, which the next window shares
            self._offset -= len(self._pieces.popleft().tokens)
            parts.append(self._pieces[0].tokens[: size - sum(map(len, parts))])
        return np.concatenate(parts)

    def _read(self) -> None:
        """Tokenise some rows more."""
        texts = list(islice(self._texts, _ROWS_AT_ONCE))
        if texts:
            ids = [i for text in self._tokenizer.encode_batch(texts) for i in (*text, self._tokenizer.end_of_document)]
            self._pieces.append(Piece(np.array(ids, dtype=np.int64), self._state))
            self._state, self._is_empty = self._rows.state_dict(), False
            return
        if self._is_empty:
            raise DataError("data.hf.streaming=true: a part of the stream has no text; use fewer data.hf.lanes")
        self._rows, self._state = self._open_rows(), None
        self._iterate()

    def _leave_bookmark(self) -> None:
        """Write down where the next block begins, and forget bookmarks that others stand close to."""
        first = self._pieces[0] if self._pieces else Piece(np.zeros(0), self._state)
        mark = {"rows": first.rows, "offset": self._offset}
        path = self._bookmarks / f"{self._next:09d}.json"
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            self._bookmarks.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(mark))
            os.replace(unfinished, path)  # ranks may write the same one
            for number in self._marked():
                if not _is_kept(number, self._next):
                    (self._bookmarks / f"{number:09d}.json").unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror}); choose another data.cache_dir") from None

    def _marked(self) -> list[int]:
        return sorted(int(path.stem) for path in self._bookmarks.glob("[0-9]*.json"))

    def _go_near(self, number: int) -> None:
        """Continue from the last bookmark that is not behind block `number`, or from the beginning."""
        for marked in reversed([0, *self._marked()]):
            if marked > number:
                continue
            try:
                mark = json.loads((self._bookmarks / f"{marked:09d}.json").read_text())
                self._start(mark["rows"], marked, mark["offset"])
                return
            except (OSError, ValueError, KeyError):  # another rank has removed it, or it is damaged
                continue
        self._start(None, 0)


def _is_kept(number: int, newest: int) -> bool:
    """Whether the bookmark of a block is worth its place: the older, the fewer, so that some 16 stay of each age."""
    return number % (1 << (max(0, newest - number) // 16).bit_length()) == 0


class StreamWindows:
    """The training split of a stream: `Samples` without an end.

    A batch of `global_batch` consecutive numbers takes equally many windows from each lane, first those of the first
    lane. With `shuffle`, as many windows of a lane are shuffled among themselves, always alike.
    """

    def __init__(
        self, make_lane: Callable[[int, int], Lane], lanes: int, seq_len: int, global_batch: int, shuffle: int
    ) -> None:
        """`make_lane` makes the lane of a number, with blocks of a size."""
        self.seq_len = seq_len
        self._in_a_row, self._shuffle = max(1, global_batch // lanes), shuffle
        self._block = shuffle if shuffle > 1 else _PLAIN_BLOCK
        self._make_lane, self._num_lanes = make_lane, lanes
        self._lanes: dict[int, Lane] = {}  # those that this rank reads

    def __len__(self) -> int:
        return ENDLESS

    def batch(self, numbers: Sequence[int]) -> Batch:
        """See `Samples`. Numbers that grow are read in one go; others cost reading again."""
        ids_BT1 = torch.stack([self._window(number) for number in numbers])
        return Batch({"ids_BT": ids_BT1[:, :-1], "sample_B": torch.tensor(list(numbers))}, ids_BT1[:, 1:])

    def num_targets(self, numbers: Sequence[int]) -> int:
        """See `Samples`: every token but a window's first is a target."""
        return len(numbers) * self.seq_len

    def target_entropy(self) -> float:
        """See `Samples`: unknown before the end, which there is not."""
        raise NotImplementedError("a stream has no end")

    def _window(self, number: int) -> torch.Tensor:
        row, place = divmod(number, self._in_a_row)
        turn, lane = divmod(row, self._num_lanes)
        block, place = divmod(turn * self._in_a_row + place, self._block)
        if lane not in self._lanes:
            self._lanes[lane] = self._make_lane(lane, self._block)
        if self._shuffle > 1:
            key = np.array([lane, block], dtype=np.uint64)
            place = int(np.random.Philox(key=key).random_raw(self._block).argsort(kind="stable")[place])
        return torch.from_numpy(self._lanes[lane].block(block)[place])
