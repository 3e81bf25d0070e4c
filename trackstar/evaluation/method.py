"""What is compared: anything that gives sentences for queries.

Contract: a method answers queries in the order given, one `Retrieval` each, of at most k sentences, and the answer to a
query does not depend on which others are asked with it. Ties follow `retrieval.TIE_RULE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from trackstar.evaluation.retrieval import Retrieval
from trackstar.results import Query

# Called with (step, units done, units in total).
OnStep = Callable[[str, int, int], None]


def unheard(_step: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


class Method(Protocol):
    """One row of the table."""

    @property
    def name(self) -> str:
        """How tables and files call it."""

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """The best k sentences of every query."""


def text_of(query: Query) -> str:
    """What methods that know no model search for: the prompt and the target, as one text."""
    return f"{query.prompt.rstrip()} {query.target.strip()}"
