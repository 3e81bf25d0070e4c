"""What is printed, on a terminal and elsewhere, for texts that try to be more than text."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from trackstar.console import bytes_text, plain, print_trace
from trackstar.passages import Passage
from trackstar.results import Evidence, Influence, Query, Trace


def passage(text: str) -> Passage:
    return Passage(
        passage_id=0,
        doc_id="corpus.jsonl:1",
        text=text,
        source="corpus.jsonl",
        metadata={},
        token_start=0,
        token_end=1,
        tokens=np.array([1], dtype=np.int32),
    )


def trace(text: str, tokens: tuple[tuple[str, float], ...]) -> Trace:
    evidence = Evidence(tokens=tokens, blocks=(), overlap=0.0)
    found = Influence(rank=1, passage=passage(text), score=0.125, z_score=3.5, evidence=evidence)
    return Trace(
        query=Query(query_id="q", prompt="The capital of Peru is", target="Lima"),
        proponents=(found,),
        opponents=(),
        loss=0.5,
        background_mean=0.0,
        background_std=0.04,
        generation="abc",
        exact=True,
        examined=10,
        seconds={"scan": 0.25},
    )


def printed(found: Trace, *, terminal: bool = False, prediction: str | None = None) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal, color_system="standard" if terminal else None)
    print_trace(console, found, prediction=prediction)
    return stream.getvalue()


def test_without_a_terminal_marked_words_stand_in_brackets() -> None:
    found = trace("Lima is not Paris", (("Lima", 0.3), (" is", 0.025), (" not", 0.0), (" Paris", -0.3)))
    text = printed(found, prediction="Lima.")
    assert "[Lima] is not (Paris)" in text
    assert "+0.1250" in text
    assert "+3.5" in text
    assert "probability 0.607" in text
    assert "model says" in text
    assert "corpus.jsonl:1" in text
    assert "\x1b" not in text


def test_on_a_terminal_words_are_marked_without_relying_on_colour() -> None:
    text = printed(trace("Lima is", (("Lima", 0.3), (" is", 0.0))), terminal=True)
    assert "\x1b[1;32mLima\x1b[0m" in text  # 1 is bold
    assert "[Lima]" not in text


def test_a_corpus_cannot_speak_to_the_terminal_or_to_rich() -> None:
    hostile = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \u202eback\nnext"
    text = printed(trace(hostile, (("red", 0.1),)))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "[bold]markup[/bold]" in text
    assert "back next" in text


def test_plain_keeps_every_place() -> None:
    assert plain("a\x1bb\tc\x00") == "a\N{REPLACEMENT CHARACTER}b c\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (3 << 40, "3.0 TiB"), (5 << 60, "5,120.0 PiB")]
)
def test_bytes_are_told_in_binary_units(size: int, text: str) -> None:
    assert bytes_text(size) == text
