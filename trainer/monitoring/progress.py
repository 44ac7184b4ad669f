"""The progress of a run on the terminal: a live bar, or a plain line now and then in a file or a pipe."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_PLAIN_LINES = 20  # lines of a whole run when the output is no terminal


class Progress:
    """Step, loss, targets per second and time left, for one process; with `enabled=False` (ranks > 0) it is silent.

    Use as a context manager; `first_step` is the step that a resumed run continues from, `unit` what a target is.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool = True,
        first_step: int = 0,
        console: Console | None = None,
        unit: str = "token",
    ) -> None:
        self._console = console or Console(quiet=not enabled)
        self._total = total_steps
        self._first = first_step
        self._unit = unit
        self._started = time.monotonic()
        self._bar = RichProgress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("loss [bold]{task.fields[loss]}"),
            TextColumn(f"{{task.fields[speed]}} {unit}s/s"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, loss="–", speed="–")

    def update(self, step: int, loss: float, targets_per_s: float) -> None:
        """Show that `step` (counted from 1) is done."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{targets_per_s:,.0f}")
        elif step == self._total or step % max(1, self._total // _PLAIN_LINES) == 0:
            seconds = (time.monotonic() - self._started) / max(1, step - self._first) * (self._total - step)
            left = f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
            speed = f"{targets_per_s:,.0f} {self._unit}s/s"
            self._plain(f"step {step}/{self._total}  loss {loss:.4f}  {speed}  {left} left")

    def print(self, *objects: Any) -> None:
        """Print above the bar, as it is: without markup, highlighting or line wrapping."""
        self._plain(*objects)

    def _plain(self, *objects: Any) -> None:
        self._console.print(*objects, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
