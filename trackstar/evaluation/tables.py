"""Tables in Markdown, and how they write numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; cells may hold any text."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], f"| {' | '.join(['---'] * len(head))} |", *lines[1:]]


def mean(numbers: Mapping[str, Any]) -> str:
    """The mean alone."""
    return short(numbers["mean"])


def with_interval(numbers: Mapping[str, Any]) -> str:
    """The mean, and in brackets its interval."""
    return f"{short(numbers['mean'])} [{short(numbers['low'])}, {short(numbers['high'])}]"


def short(value: float) -> str:
    """Three figures, without the zero before the point."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"
