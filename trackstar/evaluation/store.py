"""Retrievals on disk: JSONL in the release's record format, and a receipt that tells when they may be used again.

    retrievals/<method>.jsonl           the evaluated queries, with the texts found
    retrievals/<method>.held-out.jsonl  the queries that fusions are fitted on, if any
    retrievals/<method>.json            receipt: digest of everything that determines the two, and of the files

Contract: a method is finished when its receipt is there; it is written last. Scores are written in full, so what is
read back equals what was found. Files hold no time and no host: the same settings give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trackstar.errors import CorruptArtifact, NotFound
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.measures import hits_of
from trackstar.evaluation.method_settings import folder_name
from trackstar.evaluation.retrieval import Retrieval
from trackstar.evaluation.sentences import Sentences
from trackstar.records import retrieval_record
from trackstar.results import Query
from trackstar.storage import file_digest, publish, publish_json, read_json


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """Queries in order, each with the fact that it asks; `facts` is empty where no gold is known."""

    queries: Sequence[Query]
    facts: Sequence[Fact] = ()

    @property
    def gold(self) -> list[tuple[int, ...]] | None:
        """Positions of each query's gold sentences."""
        return None if self.queries and not self.facts else [fact.gold for fact in self.facts]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Finished:
    """What a method found: `evaluated` and `held_out` in the order asked, what it fitted, and the digest of it all."""

    evaluated: Sequence[Retrieval]
    held_out: Sequence[Retrieval]
    fitted: Mapping[str, Any]
    digest: str

    @property
    def by_id(self) -> dict[str, Retrieval]:
        """All retrievals by query id."""
        return {item.query_id: item for item in (*self.evaluated, *self.held_out)}


class RetrievalStore:
    """Retrievals of one evaluation's methods.

    Args:
        folder: where they lie.
        sentences: the corpus.
        query_set: the records' `query_set`.
    """

    def __init__(self, folder: Path, sentences: Sentences, *, query_set: str) -> None:
        self._folder = folder
        self._sentences = sentences
        self._query_set = query_set

    def read(self, name: str, digest: str) -> Finished | None:
        """What a method found before under settings of this digest, if it did.

        Raises:
            CorruptArtifact: a file is not what was written.
        """
        receipt_path, evaluated_path, held_out_path = self._paths(name)
        try:
            receipt = read_json(receipt_path)
        except NotFound:
            return None
        if not isinstance(receipt, dict) or receipt.get("digest") != digest:
            return None
        return Finished(
            evaluated=self._read(evaluated_path, receipt["evaluated"]),
            held_out=[] if receipt["held_out"] is None else self._read(held_out_path, receipt["held_out"]),
            fitted=receipt["fitted"],
            digest=digest,
        )

    def write(
        self,
        name: str,
        digest: str,
        found: Sequence[Retrieval],
        evaluated: Asked,
        held_out: Asked,
        fitted: dict[str, Any],
    ) -> Finished:
        """Publish what a method found: retrievals of the evaluated queries, then of those held out."""
        receipt_path, evaluated_path, held_out_path = self._paths(name)
        receipt_path.unlink(missing_ok=True)
        cut = len(evaluated.queries)
        receipt = {
            "digest": digest,
            "evaluated": self._write(evaluated_path, name, evaluated, found[:cut]),
            "held_out": self._write(held_out_path, name, held_out, found[cut:]) if held_out.queries else None,
            "fitted": fitted,
        }
        publish_json(receipt_path, receipt)
        return Finished(evaluated=found[:cut], held_out=found[cut:], fitted=fitted, digest=digest)

    def _paths(self, name: str) -> tuple[Path, Path, Path]:
        stem = folder_name(name)
        return self._folder / f"{stem}.json", self._folder / f"{stem}.jsonl", self._folder / f"{stem}.held-out.jsonl"

    def _write(self, path: Path, name: str, asked: Asked, found: Sequence[Retrieval]) -> str:
        lines = []
        for number, (query, item) in enumerate(zip(asked.queries, found, strict=True)):
            fact = asked.facts[number] if asked.facts else None
            record = retrieval_record(
                query,
                texts=[self._sentences.texts[position] for position in item.positions],
                ids=[self._sentences.ids[position] for position in item.positions],
                scores=item.scores.tolist(),
                correct=None if fact is None else hits_of(item, fact.gold).tolist(),
                query_set=self._query_set,
                extras={"method": name} | ({} if fact is None else {"c4_frequency_bucket": fact.bucket}),
            )
            lines.append(json.dumps(record, ensure_ascii=False))
        return publish(path, ("\n".join(lines) + "\n").encode())

    def _read(self, path: Path, digest: str) -> list[Retrieval]:
        if not path.is_file() or file_digest(path) != digest:
            raise CorruptArtifact(f"{str(path)!r} is not what was written; delete it and its .json, then run again")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [
            Retrieval.of(
                record["example_id"],
                [self._sentences.positions[sentence_id] for sentence_id in record["proponent_ids"]],
                record["proponent_scores"],
            )
            for record in records
        ]
