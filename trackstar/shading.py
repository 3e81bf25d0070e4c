"""Which words of a passage carry its score: token contributions laid over the text, and the few words worth marking.

Contract: contributions come per token, as the tokenizer decodes them one by one. That loses leading spaces
(SentencePiece) and breaks characters that several tokens share, so tokens are found again in the text in order. The
share of a word is the sum of its tokens' shares. Special tokens have no place in the text and are left out.

A token's contribution is what flows through its position of the passage, the loss of later tokens included: a word is
marked because the model learned there, not only because it learned to say it.

It knows nothing of terminals; `console` renders what it returns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"\S+")
# Scripts without spaces make "words" of a whole sentence; longer ones are taken token by token.
_LONGEST_WORD = 24
_CARRIED_SHARE = 0.5
_MOST_MARKED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Characters `start` to `end` of a text, and whether they carry the score or work against it."""

    start: int
    end: int
    share: float
    carries: bool


def place_tokens(text: str, tokens: Sequence[tuple[str, float]]) -> list[tuple[int, int, float]]:
    """(start, end, share) of every token found in the text; the tokens of a broken character go together."""
    placed: list[tuple[int, int, float]] = []
    position, skipped, waiting = 0, 0, 0.0
    for token, share in tokens:
        piece = token.strip()
        while position < len(text) and text[position].isspace():
            position += 1
        found = text.find(piece, position, position + len(piece) + 2 * skipped + 1) if piece else -1
        if found < 0:
            skipped, waiting = skipped + 1, waiting + share
            continue
        if found > position:
            placed.append((position, found, waiting))
        position = found + len(piece)
        placed.append((found, position, share))
        skipped, waiting = 0, 0.0
    if placed and skipped and position < len(text):
        placed.append((position, len(text), waiting))
    return placed


def word_shares(text: str, tokens: Sequence[tuple[str, float]]) -> list[tuple[int, int, float]]:
    """(start, end, share) of every word, or of every token of a word that is very long."""
    placed = place_tokens(text, tokens)
    shares: list[tuple[int, int, float]] = []
    following = 0
    for word in _WORD.finditer(text):
        inside = []
        while following < len(placed) and placed[following][0] < word.end():
            inside.append(placed[following])
            following += 1
        if word.end() - word.start() > _LONGEST_WORD:
            shares.extend(inside)
        else:
            shares.append((word.start(), word.end(), sum(share for _, _, share in inside)))
    return shares


def mark_words(text: str, tokens: Sequence[tuple[str, float]], score: float) -> list[Mark]:
    """The fewest words that together hold half of what carries the score, and those that work against it as strongly.

    Args:
        text: the passage.
        tokens: (decoded token, contribution) in order.
        score: their sum; its sign says which contributions carry it.

    Returns:
        Marks in order of the text, at most six of each kind.
    """
    sign = 1.0 if score >= 0 else -1.0
    shares = [(start, end, sign * share) for start, end, share in word_shares(text, tokens)]
    carrying = sorted((item for item in shares if item[2] > 0), key=lambda item: -item[2])
    total = sum(share for _, _, share in carrying)
    marks: list[Mark] = []
    reached = 0.0
    for start, end, share in carrying[:_MOST_MARKED]:
        if reached >= _CARRIED_SHARE * total:
            break
        reached += share
        marks.append(Mark(start=start, end=end, share=share, carries=True))
    least = min((mark.share for mark in marks), default=float("inf"))
    against = sorted((item for item in shares if -item[2] >= least), key=lambda item: item[2])
    marks.extend(Mark(start=start, end=end, share=share, carries=False) for start, end, share in against[:_MOST_MARKED])
    return sorted(marks, key=lambda mark: mark.start)


def excerpt(text: str, marks: Sequence[Mark], width: int) -> tuple[int, int]:
    """Start and end of at most about `width` characters of the text, around its strongest mark, cut at spaces."""
    if len(text) <= width:
        return 0, len(text)
    strongest = max((mark for mark in marks if mark.carries), key=lambda mark: mark.share, default=None)
    center = (strongest.start + strongest.end) // 2 if strongest else 0
    start = max(0, min(center - width // 2, len(text) - width))
    end = min(len(text), start + width)
    if start:
        start = text.find(" ", start, start + _LONGEST_WORD) + 1 or start
    if end < len(text):
        space = text.rfind(" ", end - _LONGEST_WORD, end)
        end = space if space > start else end
    return start, end
