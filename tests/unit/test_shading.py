"""Words marked in a text against shares added up by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackstar.shading import excerpt, mark_words, place_tokens, word_shares


def test_tokens_are_found_in_order_and_special_ones_left_out() -> None:
    tokens = [("<bos>", 9.0), ("The", 1.0), (" the", 2.0), ("e", 3.0), ("n", 4.0), (".", 5.0)]
    assert place_tokens("The theen.", tokens) == [
        (0, 3, 1.0),
        (4, 7, 2.0),
        (7, 8, 3.0),
        (8, 9, 4.0),
        (9, 10, 5.0),
    ]


def test_the_tokens_of_a_broken_character_go_together() -> None:
    # "é" and the "😀" behind it are split into bytes that decode to nothing printable one by one.
    tokens = [("caf", 1.0), ("\N{REPLACEMENT CHARACTER}", 0.25), ("\N{REPLACEMENT CHARACTER}", 0.5), (" is", 2.0)]
    assert place_tokens("café is", tokens) == [(0, 3, 1.0), (3, 5, 0.75), (5, 7, 2.0)]
    assert place_tokens("ok 😀", [("ok", 1.0), *[("\N{REPLACEMENT CHARACTER}", 0.5)] * 4]) == [(0, 2, 1.0), (3, 4, 2.0)]


def test_a_words_share_is_the_sum_of_its_tokens() -> None:
    tokens = [("Par", 0.5), ("is", 0.25), ("is", -0.125), ("nice", 0.0)]  # leading spaces lost, as SentencePiece does
    assert word_shares("Paris is nice", tokens) == [(0, 5, 0.75), (6, 8, -0.125), (9, 13, 0.0)]


def test_a_word_of_a_script_without_spaces_is_taken_apart() -> None:
    text = "巴" * 20 + "黎" * 20
    tokens = [("巴" * 20, 1.0), ("黎" * 20, 2.0)]
    assert word_shares(text, tokens) == [(0, 20, 1.0), (20, 40, 2.0)]


def test_the_fewest_words_that_carry_half_are_marked() -> None:
    tokens = [("a", 0.1), (" b", 0.6), (" c", -0.7), (" d", 0.2), (" e", -0.1)]
    marks = mark_words("a b c d e", tokens, 0.1)
    assert [(mark.start, mark.carries) for mark in marks] == [(2, True), (4, False)]


def test_in_an_opponent_the_negative_words_carry() -> None:
    tokens = [("a", 0.1), (" b", 0.6), (" c", -0.9)]
    assert [(mark.start, mark.carries) for mark in mark_words("a b c", tokens, -0.2)] == [(4, True)]


def test_nothing_is_marked_without_contributions() -> None:
    assert mark_words("a b", [], 0.5) == []
    assert mark_words("a b", [("a", 0.0), (" b", 0.0)], 0.0) == []


def test_an_excerpt_holds_the_strongest_word_and_cuts_at_spaces() -> None:
    text = "word " * 100 + "Paris " + "word " * 100
    marks = mark_words(text, [("word ", 0.0)] * 100 + [("Paris", 1.0)], 1.0)
    start, end = excerpt(text, marks, 60)
    assert "Paris" in text[start:end]
    assert end - start <= 60
    assert {word.strip() for word in text[start:end].split()} <= {"word", "Paris"}
    assert excerpt("short", [], 60) == (0, 5)


@given(
    words=st.lists(st.text("abcé", min_size=1, max_size=8), min_size=1, max_size=12),
    score=st.sampled_from([1.0, -1.0]),
    data=st.data(),
)
def test_words_keep_the_sum_of_tokens_that_cover_the_text(words: list[str], score: float, data: st.DataObject) -> None:
    text = " ".join(words)
    pieces = [word[cut:end] for word in words for cut, end in ((0, len(word) // 2), (len(word) // 2, len(word)))]
    tokens = [(piece, data.draw(st.floats(-1, 1))) for piece in pieces if piece]
    shares = word_shares(text, tokens)
    assert [text[start:end] for start, end, _ in shares] == words
    assert sum(share for _, _, share in shares) == pytest.approx(sum(share for _, share in tokens), abs=1e-9)
    marks = mark_words(text, tokens, score)
    assert all(first.end <= second.start for first, second in pairwise(marks))
    assert all(mark.share * (1 if mark.carries else -1) > 0 for mark in marks)
