"""A circuit breaker: while something is down, callers are told so at once instead of each waiting for it.

    closed     every attempt goes through; `failure_threshold` failures in a row open it
    open       nothing goes through for `reset_seconds`
    half-open  one attempt at a time goes through: its success closes the breaker, its failure opens it again

An attempt that tells nothing, because its caller left or gave it too little time, counts neither way. So does one that
ends in another period than it began in: a call that began before the failure says nothing about now.

Safe to use from several threads. It knows nothing of what is called, and does not retry.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from trackstar.errors import InvalidRequest, NotReady

BreakerState = Literal["closed", "open", "half-open"]


class CircuitOpen(NotReady):
    """Not attempted: the last attempts failed. `retry_seconds` is the time until one may go through again."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class Attempt:
    """One attempt that went through; tell it how it ended."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.outcome: bool | None = None

    def succeeded(self) -> None:
        """There was an answer, whatever it says."""
        self.outcome = True

    def failed(self) -> None:
        """There was none."""
        self.outcome = False


class CircuitBreaker:
    """Lets attempts through or refuses them.

    Args:
        name: of what is called, as messages name it.
        failure_threshold: failures in a row that open it, at least 1.
        reset_seconds: time for which it stays open, above 0.
        clock: seconds, never going back.
        on_change: called with the new state after each change, from the thread that caused it.
    """

    def __init__(
        self,
        name: str,
        *,
        failure_threshold: int = 5,
        reset_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[BreakerState], None] = lambda _state: None,
    ) -> None:
        if failure_threshold < 1 or not reset_seconds > 0:
            raise InvalidRequest(
                f"a circuit breaker needs a threshold of at least 1 and a reset time above 0, not {failure_threshold} "
                f"and {reset_seconds:g}"
            )
        self._name = name
        self._threshold = failure_threshold
        self._reset_seconds = reset_seconds
        self._clock = clock
        self._on_change = on_change
        self._lock = threading.Lock()
        self._state: BreakerState = "closed"
        self._failures = 0
        self._opened_at = 0.0
        self._is_trying = False
        # Counts the changes of state.
        self._period = 0

    @property
    def state(self) -> BreakerState:
        """Now; an open one turns half-open with the first attempt after its time."""
        return self._state

    @contextmanager
    def attempt(self) -> Iterator[Attempt]:
        """The time of one attempt.

        Raises:
            CircuitOpen: not now.
        """
        attempt = self._enter()
        try:
            yield attempt
        finally:
            self._leave(attempt)

    def _enter(self) -> Attempt:
        with self._lock:
            state = self._state
            if state == "open":
                left = self._opened_at + self._reset_seconds - self._clock()
                if left > 0:
                    raise CircuitOpen(f"{self._name} does not answer; it is tried again in {left:.1f} seconds", left)
                self._change("half-open")
            elif state == "half-open" and self._is_trying:
                raise CircuitOpen(f"{self._name} does not answer; it is being tried again now", self._reset_seconds)
            self._is_trying = self._state == "half-open"
            attempt = Attempt(self._period)
        if state == "open":
            self._on_change("half-open")
        return attempt

    def _leave(self, attempt: Attempt) -> None:
        with self._lock:
            if attempt.period != self._period:
                return
            before = self._state
            self._is_trying = False
            if attempt.outcome is True:
                self._failures = 0
                if before == "half-open":
                    self._change("closed")
            elif attempt.outcome is False:
                self._failures += 1
                if before == "half-open" or self._failures >= self._threshold:
                    self._opened_at = self._clock()
                    self._change("open")
            after = self._state
        if after != before:
            self._on_change(after)

    def _change(self, state: BreakerState) -> None:
        self._state = state
        self._failures = 0
        self._period += 1
