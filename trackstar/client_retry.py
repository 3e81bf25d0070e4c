"""When a failed call is tried again, how long after, and when it is given up.

Contract: only what may succeed by itself later is tried again: no replica ready, no capacity, a lost connection. The
pause is what the server asked for, or grows from try to try, and is spread at random so that callers do not come back
all at once. A pause that would outlast the deadline is not begun: the error comes at once. Every call of the contract
either reads or repeats harmlessly, so trying again never does anything twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from trackstar.errors import DeadlineExceeded, NotReady, Overloaded, TrackstarError
from trackstar.rpc_errors import from_call


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """`attempts`: tries in all. `first_seconds`: first pause, doubled each time up to `longest_seconds`."""

    attempts: int = 4
    first_seconds: float = 0.1
    longest_seconds: float = 5.0


class Attempts:
    """The tries of one call.

    Args:
        policy: how many and how far apart.
        timeout_seconds: for all of them together, pauses included.
        clock: monotonic seconds.
        spread: a factor of 1 or more for a pause, drawn anew each time.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_seconds: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = lambda: random.uniform(1.0, 1.5),
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._spread = spread
        self._until = clock() + timeout_seconds
        self._failed = 0

    def seconds_left(self) -> float:
        """For the next try.

        Raises:
            DeadlineExceeded: none are left.
        """
        left = self._until - self._clock()
        if left <= 0:
            raise DeadlineExceeded("the time given is over; allow more with a longer timeout")
        return left

    def pause_after(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next try.

        Raises:
            TrackstarError: what the call failed with, if there is no other try.
        """
        return self.pause_after_error(from_call(error), cause=error)

    def pause_after_error(self, failure: TrackstarError, *, cause: BaseException | None = None) -> float:
        """As `pause_after`, for an error that is one of ours already."""
        self._failed += 1
        if self._failed >= self._policy.attempts or not isinstance(failure, NotReady | Overloaded):
            raise failure from cause
        pause = min(self._policy.first_seconds * 2 ** (self._failed - 1), self._policy.longest_seconds)
        if failure.retry_after_seconds is not None:
            pause = failure.retry_after_seconds
        spread_pause: float = pause * self._spread()
        if self._clock() + spread_pause >= self._until:
            raise failure from cause
        return spread_pause
