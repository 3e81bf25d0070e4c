"""The circuit breaker: against a model of single attempts, overlapping attempts case by case, and from threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.breaker import Attempt, BreakerState, CircuitBreaker, CircuitOpen
from trackstar.errors import InvalidRequest, NotReady

THRESHOLD, RESET = 3, 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker_at(clock: Clock) -> tuple[CircuitBreaker, list[BreakerState]]:
    changes: list[BreakerState] = []
    breaker = CircuitBreaker(
        "it", failure_threshold=THRESHOLD, reset_seconds=RESET, clock=clock, on_change=changes.append
    )
    return breaker, changes


def tell(attempt: Attempt, outcome: bool | None) -> None:
    if outcome is True:
        attempt.succeeded()
    elif outcome is False:
        attempt.failed()


def run(breaker: CircuitBreaker, *outcomes: bool | None) -> None:
    for outcome in outcomes:
        with breaker.attempt() as attempt:
            tell(attempt, outcome)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, RESET / 2, RESET]), st.sampled_from([True, False, None]))))
def test_attempts_one_after_the_other_follow_the_rules(steps: list[tuple[float, bool | None]]) -> None:
    clock = Clock()
    breaker, changes = breaker_at(clock)
    run_of_failures, opened_at = 0, None
    for seconds, outcome in steps:
        clock.now += seconds
        if opened_at is not None and clock.now < opened_at + RESET:
            with pytest.raises(CircuitOpen) as caught, breaker.attempt():
                raise AssertionError("it let an attempt through")
            assert caught.value.retry_seconds == pytest.approx(opened_at + RESET - clock.now)
            assert breaker.state == "open"
            continue
        is_trial = opened_at is not None
        run(breaker, outcome)
        if outcome is True:
            run_of_failures, opened_at = 0, None
        elif outcome is False:
            run_of_failures += 1
            if is_trial or run_of_failures == THRESHOLD:
                run_of_failures, opened_at = 0, clock.now
        elif is_trial:
            # A trial that tells nothing leaves the next attempt to be one.
            assert breaker.state == "half-open"
            continue
        assert breaker.state == ("closed" if opened_at is None else "open")
    assert all(before != after for before, after in pairwise(changes))
    assert not changes or changes[-1] == breaker.state


def test_one_attempt_at_a_time_goes_through_when_half_open() -> None:
    clock = Clock()
    breaker, changes = breaker_at(clock)
    run(breaker, False, False, False)
    clock.now += RESET
    with breaker.attempt() as trial:
        for _ in range(3):
            with pytest.raises(CircuitOpen, match="being tried again now"):
                run(breaker, True)
        trial.succeeded()
    run(breaker, True)
    assert changes == ["open", "half-open", "closed"]


def test_what_began_in_another_period_says_nothing() -> None:
    clock = Clock()
    breaker, changes = breaker_at(clock)
    with ExitStack() as early:
        attempts = [early.enter_context(breaker.attempt()) for _ in range(4)]
        run(breaker, False, False, False)
        for attempt, outcome in zip(attempts, (True, False, False, False), strict=True):
            tell(attempt, outcome)
    assert breaker.state == "open"
    clock.now += RESET
    run(breaker, True)
    assert changes == ["open", "half-open", "closed"]


def test_a_caller_that_is_interrupted_gives_the_trial_back() -> None:
    clock = Clock()
    breaker, _ = breaker_at(clock)
    run(breaker, False, False, False)
    clock.now += RESET
    with pytest.raises(KeyboardInterrupt), breaker.attempt():
        raise KeyboardInterrupt
    run(breaker, True)
    assert breaker.state == "closed"


def test_of_many_threads_one_tries() -> None:
    clock = Clock()
    breaker, _ = breaker_at(clock)
    run(breaker, False, False, False)
    clock.now += RESET
    num = 16
    together, done = threading.Barrier(num), threading.Barrier(num)

    def one(_: int) -> bool:
        together.wait()
        try:
            with breaker.attempt() as attempt:
                done.wait()
                attempt.succeeded()
        except CircuitOpen:
            done.wait()
            return False
        return True

    with ThreadPoolExecutor(num) as threads:
        assert sum(threads.map(one, range(num))) == 1
    assert breaker.state == "closed"


def test_the_refusal_says_when_and_is_not_ready() -> None:
    clock = Clock()
    breaker, _ = breaker_at(clock)
    run(breaker, False, False, False)
    clock.now += 2.5
    with pytest.raises(NotReady, match=r"it does not answer; it is tried again in 7\.5 seconds"):
        run(breaker, True)


@pytest.mark.parametrize(("threshold", "reset"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, float("nan"))])
def test_settings_without_sense_are_refused(threshold: int, reset: float) -> None:
    with pytest.raises(InvalidRequest, match="circuit breaker"):
        CircuitBreaker("it", failure_threshold=threshold, reset_seconds=reset)
