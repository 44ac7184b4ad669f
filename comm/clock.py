"""Where a rank's time goes: phases that may nest, each with the time that no inner phase takes.

On the CPU a mark is a reading of `time.perf_counter`. On CUDA it is an event on the current stream, so that nothing
waits before the step is over: a phase then has the time that the stream spent between its marks, whenever the host
issued them.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch.profiler import record_function

# Phases of a MoE layer. Whoever owns the clock may have others.
DISPATCH, EXPERTS, COMBINE = "dispatch", "experts", "combine"
EXPOSED = "exposed communication"  # this rank waits in an exchange, and nothing runs beside it
OTHER = "other"  # what no phase claims


class PhaseClock:
    """Times the phases of one rank; a profiler that runs sees each as a named range.

    Counts inside `running` alone, up to `lap`; elsewhere a phase costs next to nothing.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_cuda = device is not None and device.type == "cuda"
        self._marks: list[tuple[Any, str | None]] = []  # (moment, what begins then; None: not counted)
        self._open: list[tuple[str, str]] = []  # (phase, detail) that this rank is in, outermost first
        self._what: str | None = None  # of `running`
        self._since = 0.0  # when it began to run, by the machine's monotonic clock

    def phase(self, name: str, detail: str = "") -> "_Phase":
        """A context manager: what happens inside counts as `name`; `detail` is for profiles and `where`."""
        return _Phase(self, name, detail)

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Count what happens inside, such as "step 7"; not to be nested."""
        self._what, self._since = what, time.monotonic()
        self._mark(OTHER)
        try:
            yield
        finally:
            self._mark(None)
            self._what = None

    def lap(self) -> dict[str, float]:
        """Seconds of each phase since the last lap, in the order of their first marks; together all that was counted.

        On CUDA this waits until the current stream has come here.
        """
        end = self._now()
        if self._on_cuda:
            end.synchronize()
        marks = [*self._marks, (end, self._innermost())]
        seconds: dict[str, float] = {}
        for (start, name), (stop, _) in pairwise(marks):
            if name is not None:
                passed = start.elapsed_time(stop) / 1e3 if self._on_cuda else stop - start
                seconds[name] = seconds.get(name, 0.0) + passed
        self._marks = marks[-1:]
        return seconds

    def running_for(self) -> tuple[str | None, float]:
        """What `running` was told and for how long it has been running, in seconds; (None, 0) outside of it."""
        what = self._what
        return what, 0.0 if what is None else time.monotonic() - self._since

    def where(self) -> str:
        """What this rank is doing right now, such as "step 7: forward > dispatch"; may be asked by another thread."""
        phases = " > ".join(f"{name} ({detail})" if detail else name for name, detail in list(self._open))
        return ": ".join(part for part in (self._what, phases) if part)

    def _enter(self, name: str, detail: str) -> None:
        self._open.append((name, detail))
        if self._what is not None:
            self._mark(name)

    def _leave(self, error: BaseException | None) -> None:
        if error is not None and not hasattr(error, "raised_in"):
            error.raised_in = self.where()  # type: ignore[attr-defined]  # the innermost phase, for `raised_in`
        self._open.pop()
        if self._what is not None:
            self._mark(self._innermost())

    def _innermost(self) -> str | None:
        if self._what is None:
            return None
        return self._open[-1][0] if self._open else OTHER

    def _mark(self, name: str | None) -> None:
        self._marks.append((self._now(), name))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def raised_in(error: BaseException) -> str:
    """The phases that an exception left, as `PhaseClock.where` gives them; empty if it left none."""
    return getattr(error, "raised_in", "")


class _Phase:
    """See `PhaseClock.phase`. A class and not a generator: it is entered some hundred times in a step."""

    __slots__ = ("_clock", "_detail", "_name", "_range")

    def __init__(self, clock: PhaseClock, name: str, detail: str) -> None:
        self._clock, self._name, self._detail = clock, name, detail
        self._range: record_function | None = None

    def __enter__(self) -> None:
        if torch.autograd._profiler_enabled():
            self._range = record_function(self._name, self._detail or None)
            self._range.__enter__()
        self._clock._enter(self._name, self._detail)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._leave(error)
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
