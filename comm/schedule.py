"""In which order the chunks of a dispatch are worked on, the same on every rank. Imports no torch."""

from typing import NamedTuple


class Turn(NamedTuple):
    """Stage `stage` of chunk `chunk` runs next."""

    stage: int
    chunk: int


def schedule(hops: int, chunks: int) -> list[Turn]:
    """In which order stages of chunks run, the same on every rank; stage i ends by starting exchange i + 1.

    All first exchanges start at once and all last ones are waited for at the end: the outermost network is the
    slow one, and a queue in front of it keeps it busy in both directions. In between, a chunk takes a step every
    second turn, so that while its exchange is under way another chunk has its turn; the experts, in the middle
    stage, run beside the hops of their neighbours.
    """
    stages = 2 * hops + 1
    turns = [Turn(stage, chunk) for stage in range(stages) for chunk in range(chunks)]

    def moment(turn: Turn) -> tuple[int, int, int]:
        if turn.stage in (0, stages - 1):
            return (turn.stage, turn.chunk, 0)
        return (1, turn.chunk + 2 * (turn.stage - 1), -turn.stage)

    return sorted(turns, key=moment)
