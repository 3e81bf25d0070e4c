"""Which facts are asked for what: evaluated, held out for fusions, and for the task mix; drawn once, by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trackstar.errors import InvalidRequest
from trackstar.evaluation.config import QueriesConfig
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.store import Asked
from trackstar.storage import digest_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """Three sets of queries without a fact in common, each in the order of the facts file."""

    evaluated: Asked
    held_out: Asked
    task: Asked

    @classmethod
    def draw(cls, facts: Sequence[Fact], config: QueriesConfig) -> Selection:
        """Draw the three.

        Raises:
            InvalidRequest: there are too few facts, or one lacks the prompt template.
        """
        others = config.held_out + config.task_queries
        wanted = max(1, len(facts) - others) if config.queries is None else config.queries
        if wanted + others > len(facts):
            raise InvalidRequest(
                f"there are {len(facts):,} facts with gold sentences; {wanted:,} queries, {config.held_out:,} held out "
                f"and {config.task_queries:,} for the task mix are more"
            )
        order = np.random.default_rng(config.seed).permutation(len(facts))
        cuts = np.cumsum([wanted, config.held_out, config.task_queries])
        evaluated, held_out, task, _ = (
            [facts[number] for number in np.sort(part).tolist()] for part in np.split(order, cuts)
        )
        prompt = config.prompt
        return cls(
            evaluated=Asked(queries=[fact.query(prompt) for fact in evaluated], facts=evaluated),
            held_out=Asked(queries=[fact.query(prompt) for fact in held_out], facts=held_out),
            task=Asked(queries=[fact.query(prompt) for fact in task], facts=task),
        )

    @property
    def asked(self) -> Asked:
        """What every method answers: the evaluated, then the held-out queries."""
        return Asked(
            queries=[*self.evaluated.queries, *self.held_out.queries],
            facts=[*self.evaluated.facts, *self.held_out.facts],
        )


def digest_of_asked(asked: Asked) -> str:
    """Of all that methods can see of the queries, and their gold."""
    return digest_of(
        [
            [query.query_id, query.prompt, query.target, fact.gold]
            for query, fact in zip(asked.queries, asked.facts, strict=True)
        ]
    )
