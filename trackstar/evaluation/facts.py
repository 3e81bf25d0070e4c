"""Facts in the release's format, and the sentences that state each: what is asked, and what counts as found.

    {"fact_id", "relation", "entity0", "entity1", "entity1_alias": [], "prompt0".."prompt2", "trex_sentences": [ids],
     "c4_frequency", ...}                                                                     a fact
    {"sentence_id", "text", "fact_triples": ["subject | relation | object", ...]}             a sentence

Gold sentences come from either side. `trex_sentences` lists their ids. `fact_triples` says what a sentence states; a
triple states a fact if subject, relation and object are the fact's (entities by any alias, or all three by their URIs),
where letter case, underscores and outer quotes do not count. With the source "auto" a fact's own list is used, and the
triples where it has none. How often the two sides agree is counted and reported either way.

Contract: a fact without gold is left out and counted; a set in which no fact has gold is refused. Every fact_id occurs
once, and every sentence that a fact names is in the corpus. In an open set none of this is asked but single fact_ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.json_lines import json_lines
from trackstar.evaluation.sentences import Sentences
from trackstar.results import Query

GoldSource = Literal["auto", "trex_sentences", "fact_triples"]
NUM_PROMPTS = 3
# A factor of two each, so that few sentences fill them as well as many: six, as in the paper.
BUCKET_STARTS = (2, 4, 8, 16, 32)

Triple = tuple[str, str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fact:
    """One fact. `gold`: positions of the sentences that are known to state it, ascending. `bucket`: of its
    frequency."""

    fact_id: str
    relation: str
    target: str
    aliases: tuple[str, ...]
    frequency: int
    bucket: str
    gold: tuple[int, ...]
    fields: Mapping[str, Any]

    @property
    def targets(self) -> tuple[str, ...]:
        """Every text that counts as the right answer."""
        return (self.target, *self.aliases)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Every name of what the fact is about."""
        return (self.fields["entity0"], *_aliases(self.fields, "entity0"))

    def query(self, prompt: int = 0) -> Query:
        """The fact asked by one of its prompt templates.

        Raises:
            InvalidRequest: it has no such template.
        """
        text = self.fields.get(f"prompt{prompt}")
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequest(f"the fact {self.fact_id!r} has no prompt{prompt}; choose another prompt template")
        return Query(query_id=self.fact_id, prompt=text, target=self.target, fields=self.fields)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FactSet:
    """Facts in the file's order.

    without_gold: facts for which no sentence is known, left out unless the set is open. agreeing, differing: facts that
    both sides annotate, and whether they name the same sentences. digest: of the file.
    """

    facts: tuple[Fact, ...]
    source: GoldSource
    without_gold: int
    agreeing: int
    differing: int
    digest: str

    @classmethod
    def read(
        cls,
        path: str | Path,
        sentences: Sentences,
        *,
        source: GoldSource = "auto",
        bucket_starts: Sequence[int] = BUCKET_STARTS,
        open_set: bool = False,
    ) -> FactSet:
        """Read a facts file and find the gold sentences of each fact.

        Args:
            path: JSONL in the release's format.
            sentences: the corpus.
            source: where gold comes from.
            bucket_starts: lowest frequency of every bucket but the first, ascending. A fact's own
                `c4_frequency_bucket` counts instead.
            open_set: the corpus need not be the one that the facts are of: a fact without gold is kept, and sentences
                that are not in the corpus are passed over.

        Raises:
            NotFound: no such file.
            InvalidRequest: a bad line, a fact_id that occurs twice, a sentence that is not in the corpus, or no fact
                with gold; the last two unless `open_set`.
        """
        file = Path(path)
        if not file.is_file():
            raise NotFound(f"there is no facts file {str(path)!r}")
        records = list(_records(file))
        if not records:
            raise InvalidRequest(f"{str(path)!r} holds no facts")
        stated = _stated([record for _, record in records], sentences)
        facts: list[Fact] = []
        agreeing = differing = without_gold = 0
        for (place, record), by_triple in zip(records, stated, strict=True):
            listed = _listed(place, record, sentences, open_set=open_set)
            if listed and by_triple:
                agreeing += listed == by_triple
                differing += listed != by_triple
            own_first = source == "trex_sentences" or (source == "auto" and listed)
            gold = listed if own_first else by_triple
            without_gold += not gold
            if gold or open_set:
                facts.append(_fact(place, record, tuple(sorted(gold)), bucket_starts))
        if not facts:
            raise InvalidRequest(
                f"none of the {len(records):,} facts of {str(path)!r} has a gold sentence in the corpus (by "
                f"{'trex_sentences or fact_triples' if source == 'auto' else source}); give the corpus that they are of"
            )
        return cls(
            facts=tuple(facts),
            source=source,
            without_gold=without_gold,
            agreeing=agreeing,
            differing=differing,
            digest=hashlib.sha256(file.read_bytes()).hexdigest(),
        )


def bucket_of(frequency: int, starts: Sequence[int] = BUCKET_STARTS) -> str:
    """Label of the bucket that a frequency falls in: "below 2", "2-3", ..., "32 or more"."""
    for number, start in enumerate(starts):
        if frequency < start:
            if number == 0:
                return f"below {start}"
            low = starts[number - 1]
            return f"{low}" if low == start - 1 else f"{low}-{start - 1}"
    return f"{starts[-1]} or more"


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of every line."""
    seen: dict[str, str] = {}
    for place, record in json_lines(file, "a fact"):
        for name in ("fact_id", "relation", "entity0", "entity1"):
            if not isinstance(record.get(name), str):
                raise InvalidRequest(f"{place}: the field {name!r} is missing or not a text")
        if not record["entity1"].strip():
            raise InvalidRequest(f"{place}: the target (field 'entity1') is empty")
        if (first := seen.setdefault(record["fact_id"], place)) != place:
            raise InvalidRequest(
                f"{place}: the fact_id {record['fact_id']!r} stands on line {first.rpartition(':')[2]} already; ids "
                "must be unique"
            )
        yield place, record


def _fact(place: str, record: dict[str, Any], gold: tuple[int, ...], bucket_starts: Sequence[int]) -> Fact:
    # Where neither a frequency nor a sentence is known, as in an open set.
    unknown = "c4_frequency" not in record and not gold
    frequency = record.get("c4_frequency", len(gold))
    if not isinstance(frequency, int):
        raise InvalidRequest(f"{place}: the field 'c4_frequency' is not a whole number")
    given = record.get("c4_frequency_bucket")
    return Fact(
        fact_id=record["fact_id"],
        relation=record["relation"],
        target=record["entity1"],
        aliases=_texts(place, record, "entity1_alias"),
        frequency=frequency,
        bucket=str(given) if given is not None else "unknown" if unknown else bucket_of(frequency, bucket_starts),
        gold=gold,
        fields=record,
    )


def _listed(place: str, record: dict[str, Any], sentences: Sentences, *, open_set: bool) -> set[int]:
    """Positions of the sentences that the fact itself names."""
    found = set()
    for sentence_id in _texts(place, record, "trex_sentences"):
        position = sentences.positions.get(sentence_id)
        if position is None:
            if open_set:
                continue
            raise InvalidRequest(
                f"{place}: the fact {record['fact_id']!r} names the sentence {sentence_id!r}, which is not in the "
                "corpus; give the corpus that the facts are of"
            )
        found.add(position)
    return found


def _stated(records: Sequence[dict[str, Any]], sentences: Sentences) -> list[set[int]]:
    """For every fact, positions of the sentences one of whose triples states it."""
    found: list[set[int]] = [set() for _ in records]
    # By subject and relation; the objects are compared one by one, so that aliases do not multiply.
    candidates: dict[tuple[str, str], list[tuple[int, frozenset[str]]]] = {}
    for number, record in enumerate(records):
        relation = _plain(record["relation"])
        names = {_plain(name) for name in (record["entity0"], *_aliases(record, "entity0"))}
        objects = frozenset(_plain(name) for name in (record["entity1"], *_aliases(record, "entity1")))
        for name in names:
            candidates.setdefault((name, relation), []).append((number, objects))
        uris = [record.get(f"{part}_uri") for part in ("entity0", "relation", "entity1")]
        if all(isinstance(uri, str) for uri in uris):
            subject, relation, thing = (_plain(str(uri)) for uri in uris)
            candidates.setdefault((subject, relation), []).append((number, frozenset({thing})))
    for position, text in enumerate(sentences.triples):
        for subject, relation, thing in _triples(text, sentences.ids[position]):
            for number, objects in candidates.get((subject, relation), ()):
                if thing in objects:
                    found[number].add(position)
    return found


def _triples(text: str, sentence_id: str) -> Iterator[Triple]:
    """The triples of a sentence's annotation: texts "subject | relation | object", or lists of three."""
    if not text:
        return
    try:
        annotated = json.loads(text)
    except json.JSONDecodeError:
        annotated = None
    for item in annotated if isinstance(annotated, list) else [None]:
        parts = [part.strip() for part in item.split(" | ")] if isinstance(item, str) else item
        if not isinstance(parts, list) or len(parts) != 3 or not all(isinstance(part, str) for part in parts):
            raise InvalidRequest(
                f"the sentence {sentence_id!r} has fact_triples that are no list of 'subject | relation | object'"
            )
        subject, relation, thing = (_plain(part) for part in parts)
        yield subject, relation, thing


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").strip().strip('"').split()).casefold()


def _aliases(record: Mapping[str, Any], entity: str) -> list[str]:
    found = record.get(f"{entity}_alias") or []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _texts(place: str, record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = record.get(name) or []
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise InvalidRequest(f"{place}: the field {name!r} is not a list of texts")
    return tuple(found)
