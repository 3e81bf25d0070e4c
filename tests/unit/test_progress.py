"""Progress lines under a clock that the test turns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from trackstar.progress import StepProgress, duration_text


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with StepProgress(Console(file=stream, width=80), clock=clock) as progress:
        progress.start("coding", 0, 100)
        for done in range(1, 41):
            clock.now += 0.5
            progress.advance("coding", done, 0)
    assert lines(stream) == [
        "coding: 20 of 100 passages, 2.0 passages/s, 40 s left",
        "coding: 40 of 100 passages, 2.0 passages/s, 30 s left",
        "coding: 40 of 100 passages, 2.0 passages/s, took 20 s",
    ]


def test_remaining_time_goes_by_tokens_where_a_step_does() -> None:
    clock, stream = Clock(), io.StringIO()
    with StepProgress(Console(file=stream), clock=clock) as progress:
        progress.start("encoding", 50, 200, tokens=3000)
        clock.now += 10
        progress.advance("encoding", 50, 500)
        clock.now += 10
        progress.advance("encoding", 100, 500)
    assert lines(stream)[:2] == [
        "encoding: 50 of 200 passages, 50 tokens/s, 50 s left",
        "encoding: 100 of 200 passages, 50 tokens/s, 40 s left",
    ]


def test_a_step_that_was_not_announced_goes_on_with_the_last_total() -> None:
    clock, stream = Clock(), io.StringIO()
    with StepProgress(Console(file=stream), clock=clock) as progress:
        progress.start("coding", 0, 10)
        progress.advance("coding", 10, 0)
        clock.now += 1
        progress.advance("importing", 10, 0)
    assert lines(stream) == [
        "coding: 10 of 10 passages, 10.0 passages/s, took 1 s",
        "importing: 10 of 10 passages, took 0 s",
    ]


def test_notes_are_text() -> None:
    stream = io.StringIO()
    with StepProgress(Console(file=stream, width=20)) as progress:
        progress.note("[red]seven[/red] bad records were\nskipped")
    assert lines(stream) == ["note: [red]seven[/red] bad records were skipped"]


def test_a_terminal_gets_bars_that_end_full() -> None:
    clock, stream = Clock(), io.StringIO()
    with StepProgress(Console(file=stream, width=120, force_terminal=True), clock=clock) as progress:
        progress.start("encoding", 0, None)
        clock.now += 2
        progress.advance("encoding", 8, 400)
        progress.start("coding", 0, 8)
        progress.advance("coding", 8, 0)
    last = stream.getvalue()
    assert "8 passages" in last
    assert "200 tokens/s" in last
    assert "took 2 s" in last
    assert "8 of 8 passages" in last


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (400000, "111 h 06 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
