"""What runbooks tell to give and to ask exists: commands with their options, values of the chart, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.charts.prometheus import RUNBOOKS, selectors, written_out
from tests.charts.rendering import CHART
from trackstar import cli

BOOKS = sorted(RUNBOOKS.glob("*.md"))


def text_of(book: Path) -> str:
    return book.read_text(encoding="utf-8")


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_commands_can_be_given(book: Path) -> None:
    found = re.findall(r"^ +(trackstar [^#\n]*)|`(trackstar [^`]*)`", text_of(book), re.MULTILINE)
    for line in (indented or inline for indented, inline in found):
        assert can_be_given(line.removeprefix("trackstar ").rstrip(" …")), line


@pytest.mark.parametrize("line", ["no-such-command", "audit INDEX --no-such-option", "jobs --address a no-such"])
def test_what_cannot_be_given_is_noticed(line: str) -> None:
    assert not can_be_given(line)


def can_be_given(line: str) -> bool:
    """Whether there are such a command and such options: it is read, and then only shows its help."""
    return cli.main([*shlex.split(line), "--help"]) == 0


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_values_exist_and_links_lead_somewhere(book: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:[a-zA-Z\[\]]+\.)+[a-zA-Z_\[\]]+)`", text_of(book)):
        first, *rest = name.split(".")
        # `build` is a section of a job, `audit.json` a file.
        if first == "build" or name.endswith((".json", ".yaml")):
            continue
        here = values
        for key in (first, *rest):
            here = here[key.removesuffix("[]")]
            if key.endswith("[]"):
                here = here[0]
            # The gateway's own settings come after this.
            if here == {}:
                break
    for target in re.findall(r"\]\(([^)#]+)", text_of(book)):
        assert (book.parent / target).is_file(), target


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_there_is_something_to_look_at_and_to_do(book: Path) -> None:
    text = text_of(book)
    assert text.startswith(f"# {book.stem}\n\n**Means.** ")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == ["Look", "Do", "Over when"]
    assert written_out(book) or "kubectl" in text
    for expr in written_out(book):
        assert list(selectors(expr)), expr
