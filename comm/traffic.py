"""Bytes and messages, counted where they are sent."""

from collections import defaultdict


class TrafficMeter:
    """What this rank has sent since the last `reset`, by network level and phase.

    A level is "between nodes", "inside node" (or "between racks"); what a rank keeps for itself is not traffic.
    A phase is what the bytes were for: counts, metadata, dispatch, combine, and the backward ones.
    """

    def __init__(self) -> None:
        self._sent: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])

    def record(self, level: str, phase: str, sent_bytes: int, messages: int) -> None:
        """Add `messages` messages with together `sent_bytes` bytes."""
        total = self._sent[level, phase]
        total[0] += sent_bytes
        total[1] += messages

    def snapshot(self) -> dict[str, dict[str, tuple[int, int]]]:
        """{level: {phase: (bytes, messages)}} of this rank, in a stable order."""
        by_level: dict[str, dict[str, tuple[int, int]]] = {}
        for (level, phase), (sent_bytes, messages) in sorted(self._sent.items()):
            by_level.setdefault(level, {})[phase] = (sent_bytes, messages)
        return by_level

    def bytes_sent(self, level: str, *phases: str) -> int:
        """Bytes sent on `level` in the given phases, or in all of them if none is named."""
        return sum(n for (at, phase), (n, _) in self._sent.items() if at == level and (not phases or phase in phases))

    def messages_sent(self, level: str, *phases: str) -> int:
        """Messages sent on `level` in the given phases, or in all of them if none is named."""
        return sum(n for (at, phase), (_, n) in self._sent.items() if at == level and (not phases or phase in phases))

    def reset(self) -> None:
        """Start again from zero."""
        self._sent.clear()
