"""Progress of a long job on standard error: which step, how far, how fast, how long still.

Contract: `StepProgress` is a `build.Progress`. On a terminal bars are redrawn in place; elsewhere a line comes every
ten seconds and at the end of each step, so that a log stays readable. Nothing here changes what a job does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from trackstar.console import plain

_PLAIN_SECONDS = 10.0


def duration_text(seconds: float) -> str:
    """A duration to the precision that matters."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class StepProgress:
    """Shows a long job on standard error, step by step: how many units are done, the rate and the remaining time.

    On a terminal bars are redrawn in place; elsewhere a line comes every ten seconds and at the end of each step. What
    remains is told by tokens where a step goes by them, else by units.
    """

    def __init__(
        self,
        console: Console,
        *,
        unit: str = "passages",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._unit = self._default_unit = unit
        self._clock = clock
        self._tokens = 0
        self._total_tokens: int | None = None
        self._step = ""
        self._task: TaskID | None = None
        self._done = self._first = 0
        self._total: int | None = None
        self._last_total: int | None = None
        self._started = self._told = 0.0
        fields = [TextColumn(f"{{task.fields[{name}]}}") for name in ("count", "rate", "left")]
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), *fields, console=console, refresh_per_second=4
        )

    def __enter__(self) -> StepProgress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()
        if self._console.is_terminal:
            self._bars.stop()

    def start(
        self, step: str, done: int, total: int | None, *, tokens: int | None = None, unit: str | None = None
    ) -> None:
        """See `build.Progress`."""
        self._finish()
        self._step, self._done, self._first, self._total = step, done, done, total
        self._unit = unit or self._default_unit
        self._last_total = total if total is not None else self._last_total
        self._tokens, self._total_tokens = 0, tokens
        self._started = self._told = self._clock()
        if self._console.is_terminal:
            self._task = self._bars.add_task(step, total=total, completed=done, count="", rate="", left="")
            self._tell()

    def advance(self, step: str, done: int, tokens: int) -> None:
        """`done` units in all are finished; `tokens` were processed since the last call."""
        if step != self._step:
            self.start(step, 0, self._last_total)
        self._done = done
        self._tokens += tokens
        if self._task is not None or self._clock() - self._told >= _PLAIN_SECONDS:
            self._tell()

    def at(self, step: str, done: int, total: int, *, unit: str | None = None) -> None:
        """`done` of `total` units of a step are finished; it begins here if it is another step, or was further."""
        if step != self._step or done < self._done:
            self._finish()
            self.start(step, 0, total, unit=unit)
        self.advance(step, done, 0)

    def note(self, text: str) -> None:
        """Something worth telling once."""
        self._console.print(Text(f"note: {plain(text)}"), soft_wrap=not self._console.is_terminal)

    def shards(self, step: str, finished: int, planned: int) -> None:
        """Nothing: units and tokens say more."""

    def _finish(self) -> None:
        if not self._step:
            return
        took = f"took {duration_text(self._clock() - self._started)}"
        if self._task is not None:
            count, rate, _ = self._fields()
            full = max(1, self._done)
            self._bars.update(self._task, total=full, completed=full, count=count, rate=rate, left=took)
            if self._done == self._first:
                self._bars.remove_task(self._task)
            self._task = None
        elif self._done > self._first:
            self._print(took)
        self._step = ""

    def _tell(self) -> None:
        self._told = self._clock()
        count, rate, left = self._fields()
        if self._task is None:
            self._print(left)
            return
        by_tokens = self._total_tokens is not None
        self._bars.update(
            self._task,
            total=self._total_tokens if by_tokens else self._total,
            completed=self._tokens if by_tokens else self._done,
            count=count,
            rate=rate,
            left=left,
        )

    def _print(self, time_text: str) -> None:
        count, rate, _ = self._fields()
        line = ", ".join(part for part in (f"{self._step}: {count}", rate, time_text) if part)
        self._console.print(Text(line), soft_wrap=True)

    def _fields(self) -> tuple[str, str, str]:
        """Count, rate and remaining time as text."""
        elapsed = self._clock() - self._started
        tokens = self._tokens
        count = f"{self._done:,}" + (f" of {self._total:,}" if self._total is not None else "") + f" {self._unit}"
        done, total = self._done, self._total
        first, rate = self._first, ""
        if tokens:
            rate = f"{tokens / elapsed:,.0f} tokens/s" if elapsed > 0 else ""
        elif done > first and elapsed > 0:
            rate = f"{(done - first) / elapsed:,.1f} {self._unit}/s"
        if self._total_tokens is not None:
            done, first, total = tokens, 0, max(self._total_tokens, tokens)
        if total is None:
            return count, rate, "remaining time not known yet"
        if elapsed <= 0 or done <= first:
            return count, rate, ""
        remaining = max(0, total - done) * elapsed / (done - first)
        return count, rate, f"{duration_text(remaining)} left" if done < total else ""
