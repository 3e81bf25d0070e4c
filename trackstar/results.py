"""What is asked and what comes back: a query, and the trace that answers it.

Plain values that the library, the client of the service and the records of the release share; neither torch nor
transformers is needed to make or read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trackstar.passages import Passage


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What the model was given and what it said."""

    query_id: str
    prompt: str
    target: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Where a score comes from. Both lists sum to the score, up to the rounding of the stored row.

    `tokens`: (text, contribution) of every token, in order; `blocks`: (block name, contribution). `overlap` is the
    share of the query's distinct words that occur in the passage, from 0 to 1.
    """

    tokens: tuple[tuple[str, float], ...]
    blocks: tuple[tuple[str, float], ...]
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """One passage in a ranking; `score` is the cosine of the two whitened rows, `z_score` its place in the
    background."""

    rank: int
    passage: Passage
    score: float
    z_score: float
    evidence: Evidence | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The answer to one query. `loss` is the summed loss of the target in nats, `seconds` the time by stage."""

    query: Query
    proponents: tuple[Influence, ...]
    opponents: tuple[Influence, ...]
    loss: float
    background_mean: float
    background_std: float
    generation: str
    exact: bool
    examined: int
    seconds: dict[str, float]
