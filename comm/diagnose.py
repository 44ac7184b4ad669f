"""After a failure: every rank that still runs says where it is, so that the ones that do not are named.

The transport's own message names an address at best; a rank that hangs sends none at all. So a rank that fails

- leaves its words in the key-value store of the rendezvous, which needs no network between the ranks,
- hangs up, so that its peers fail at once as well, whenever their own deadlines would have come, and theirs after
  them, until the whole EP group knows,
- and calls the roll: what the others say, and who says nothing.

Costs nothing until something fails.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, distributed_c10d

from twohop.comm.errors import CommError

if TYPE_CHECKING:
    from twohop.comm.topology import Topology

T = TypeVar("T")

# Ranks that wait in an exchange answer within milliseconds of the first failure. The rest is for a busy machine, and
# for ranks that compute: a tenth of the deadline is what they get to come by.
LEAST_ROLL_CALL_S = 2.5
HANG_UP_TAG = 2**31 - 1  # of a message that nobody sends
ANSWER_S = 2.0  # a store that takes longer is cut off: its client would wait for ever
UNREACHABLE = "The store of the rendezvous does not answer: this node is cut off from it, or its host is down."
_CAME, _STOPPED = "came to ", "stopped: "


class NoticeBoard:
    """What the ranks of one topology tell each other. Every rank must make it, in the same order.

    Boards are numbered, so that words of an earlier topology are never read. With the first words of a rank its
    board, and its topology, is over.
    """

    def __init__(self, rank: int, deadline_s: float) -> None:
        self.rank, self.deadline_s = rank, deadline_s
        self.over = False
        self._deaf = False
        # The public API has no way to the store that the rendezvous made.
        store = distributed_c10d._get_default_store()
        number = self._ask(lambda: store.add(f"twohop/boards/{rank}", 1))
        if number is None:
            raise CommError(f"rank {rank}, topology: {UNREACHABLE}")
        self._store = PrefixStore(f"twohop/board/{number}", store)

    def meet(self, what: str, words: str, num_ranks: int) -> list[str]:
        """Every rank's words on `what`, by rank; a CommError names the ranks that do not come by the deadline."""
        keys = [f"{what}/{rank}" for rank in range(num_ranks)]

        def wait() -> list[bytes]:
            self._store.set(keys[self.rank], words)
            self._store.wait(keys, timedelta(seconds=self.deadline_s))
            return self._store.multi_get(keys)

        answers = self._ask(wait, self.deadline_s + ANSWER_S)
        if answers is None:
            absent = [rank for rank, key in enumerate(keys) if self._read(key) is None]
            reason = UNREACHABLE if self._deaf else f"ranks {absent} did not come within {self.deadline_s:g} s"
            raise CommError(f"rank {self.rank}, topology, {what}: {reason}")
        return [answer.decode() for answer in answers]

    def leave(self, place: str, stopped: bool = False) -> None:
        """Tell the others that this rank fails at `place`, or stops for a reason of its own. Never raises.

        The first words of a rank are its last: what follows is a consequence.
        """
        if not self.over:
            self.over = True
            self._ask(lambda: self._store.set(f"words/{self.rank}", (_STOPPED if stopped else _CAME) + place))

    def listen(self, place: str, ranks: Sequence[int]) -> str:
        """What the other `ranks` say, in sentences, for one that failed at `place`; empty if all came there too."""
        words: dict[int, str] = {}
        missing = [rank for rank in ranks if rank != self.rank]
        deadline = time.monotonic() + max(LEAST_ROLL_CALL_S, self.deadline_s / 10)
        while not self._deaf:
            words |= {rank: said for rank in missing if (said := self._read(f"words/{rank}")) is not None}
            missing = [rank for rank in missing if rank not in words]
            if not self._deaf and (not missing or time.monotonic() >= deadline):
                return _summary(place, words, missing)
            time.sleep(0.05)
        return UNREACHABLE

    def _read(self, key: str) -> str | None:
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _ask(self, question: Callable[[], T], patience_s: float = ANSWER_S) -> T | None:
        """The store's answer, or None if it has none. Only a thread of its own can be left behind at a dead socket."""
        if self._deaf:
            return None
        answers: list[T] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError, ValueError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(patience_s)
        self._deaf = thread.is_alive()
        return answers[0] if answers else None


def give_up(topology: "Topology", place: str, at_once: bool = True) -> str:
    """Leave words, hang up, and return what the EP group says, in sentences.

    Args:
        place: layer and phase, as the others shall read it.
        at_once: hang up before the roll call, not after it.
    """
    board = topology.board
    if board is None:
        return ""
    board.leave(place)
    if at_once:
        topology.hang_up()
    heard = board.listen(place, topology.ep_ranks)
    topology.hang_up()
    return heard


@contextlib.contextmanager
def announce_failure(topology: "Topology", where: str) -> Iterator[None]:
    """Around work between exchanges: an exception that leaves it reaches the waiting ranks at once, by name.

    Args:
        topology: any layout of the ranks that shall hear.
        where: layer or step and phase, as the others shall read it.
    """
    try:
        yield
    except BaseException as error:
        if topology.board is not None and not topology.board.over:
            topology.board.leave(f"{where}: {type(error).__name__}: {error}", stopped=True)
            topology.hang_up()
        raise


def hang_up(group: Any) -> None:
    """Close this rank's connections in a gloo group; whoever waits for it there fails at once.

    gloo has no call for that, but takes the end of a short wait for the end of the connections.
    """
    peers = [rank for rank in dist.get_process_group_ranks(group) if rank != dist.get_rank()]
    if dist.get_backend(group) == "gloo" and peers:
        with contextlib.suppress(RuntimeError):
            work = dist.irecv(torch.empty(1), peers[0], group, tag=HANG_UP_TAG)
            assert work is not None  # this rank is in the group
            work.wait(timedelta(milliseconds=1))


def _summary(place: str, words: dict[int, str], silent: list[int]) -> str:
    by_words: dict[str, list[int]] = {}
    for rank, said in sorted(words.items()):
        if said != _CAME + place:
            by_words.setdefault(said, []).append(rank)
    sentences = [f"{_ranks(ranks)} {said}." for said, ranks in by_words.items()]
    sentences.sort(key=lambda sentence: _STOPPED not in sentence)  # causes first
    if silent:
        sentences.insert(0, f"No word from {_ranks(silent)}: dead, stopped, cut off or busy elsewhere.")
    return " ".join(sentences)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {list(ranks)}"
