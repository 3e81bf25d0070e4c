"""Lists of passages from files in the release's record format, whoever wrote them.

Contract: a file holds one record for each query; every record has a prompt, a target and its `proponents`, texts best
first. What else it has is kept. Queries of several files are joined by `example_id`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.report import Grouping, groupings
from trackstar.queries import read_queries
from trackstar.results import Query

# Retrievals of queries that fusions are fitted on, beside those of a method.
HELD_OUT = ".held-out.jsonl"


def read_released(path: str | Path) -> dict[str, Query]:
    """The records of a file by their query's id; each record is its query's `fields`.

    Raises:
        NotFound: no such file.
        InvalidRequest: a bad line, an id that occurs twice, a record without proponents, or no proponent at all.
    """
    if not Path(path).is_file():
        raise NotFound(f"there is no file {str(path)!r} of retrievals")
    found: dict[str, Query] = {}
    for query in read_queries(path):
        if query.query_id in found:
            raise InvalidRequest(f"{str(path)!r} holds two records of the query {query.query_id!r}; ids must be unique")
        texts = query.fields.get("proponents")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest(
                f"{str(path)!r}: the record of the query {query.query_id!r} has no list 'proponents' of texts"
            )
        found[query.query_id] = query
    if not any(query.fields["proponents"] for query in found.values()):
        raise InvalidRequest(f"no record of {str(path)!r} has a proponent; there is nothing to judge")
    return found


def aligned(field: str, query: Query, path: str | Path, kind: type | tuple[type, ...]) -> list[Any]:
    """A field of a record that has one entry for each proponent.

    Raises:
        InvalidRequest: it has not, or an entry is of another kind.
    """
    values = query.fields.get(field)
    if (
        not isinstance(values, list)
        or len(values) != len(query.fields["proponents"])
        or not all(isinstance(value, kind) for value in values)
    ):
        raise InvalidRequest(
            f"{str(path)!r}: the record of the query {query.query_id!r} has no {field!r} for each of its proponents"
        )
    return values


def files_of(folder: str) -> dict[str, Path]:
    """The files of a folder of retrievals by their names, without those of held-out queries.

    Raises:
        NotFound: no such folder, or none of it.
    """
    paths = sorted(path for path in Path(folder).glob("*.jsonl") if not path.name.endswith(HELD_OUT))
    if not paths:
        raise NotFound(f"there is no folder {folder!r} of retrievals: it must hold *.jsonl files")
    return {path.stem: path for path in paths}


def joined(files: Mapping[str, Path]) -> dict[str, list[Query]]:
    """Every method's records of the first one's queries, in its order.

    Raises:
        NotFound, InvalidRequest: as `read_released`, a list that lacks a query, or one that asks it otherwise.
    """
    found: dict[str, list[Query]] = {}
    first: list[Query] = []
    for name, path in files.items():
        records = read_released(path)
        first = first or list(records.values())
        for query in first:
            other = records.get(query.query_id)
            if other is None:
                raise InvalidRequest(
                    f"the retrievals of {name!r} ({str(path)!r}) lack the query {query.query_id!r}, which "
                    f"{next(iter(files))!r} answers; give files of the same queries"
                )
            if (other.prompt, other.target) != (query.prompt, query.target):
                raise InvalidRequest(
                    f"the retrievals of {name!r} ({str(path)!r}) ask the query {query.query_id!r} with another prompt "
                    f"or target than those of {next(iter(files))!r}"
                )
        found[name] = [records[query.query_id] for query in first]
    return found


def groups_of(queries: Sequence[Query]) -> list[Grouping]:
    """Groups by what records tell: frequency bucket, relation, and right or wrong answers of the release's model."""
    facts = [_fact(query) for query in queries]
    right = {
        query.query_id: query.fields["is_8b_correct"]
        for query in queries
        if isinstance(query.fields.get("is_8b_correct"), bool)
    }
    return [
        Grouping(name=group.name, labels=group.labels, order=tuple(label for label in group.order if label))
        for group in groupings(facts, right)
        if any(group.labels)
    ]


def _fact(query: Query) -> Fact:
    fields = query.fields
    extras = fields.get("trackstar")
    bucket = fields.get("c4_frequency_bucket")
    if bucket is None and isinstance(extras, dict):
        bucket = extras.get("c4_frequency_bucket")
    frequency = fields.get("c4_frequency")
    return Fact(
        fact_id=query.query_id,
        relation=str(fields.get("relation") or ""),
        target=query.target,
        aliases=(),
        frequency=frequency if isinstance(frequency, int) else 0,
        bucket="" if bucket is None else str(bucket),
        gold=(),
        fields=fields,
    )
