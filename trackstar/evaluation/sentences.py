"""The corpus of an evaluation: its sentences in order, each known by its position.

Contract: positions are those of the documents in the corpus, from 0, and every method answers with them; so ties can be
broken by position whatever a method works on. Ids are unique. Methods read texts in order, part by part, so they may
stand in memory (`Sentences.of`) or in files (`sentence_files`). `digest` is of all ids, texts and annotations, wherever
the files lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trackstar.corpus import Corpus, CorpusConfig
from trackstar.errors import InvalidRequest

TRIPLES = "fact_triples"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sentences:
    """N sentences: the corpus's ids, the texts, and the annotated facts as JSON text ("" where there are none)."""

    ids: Sequence[str]
    texts: Sequence[str]
    triples: Sequence[str]
    digest: str
    positions: Mapping[str, int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, config: CorpusConfig) -> Sentences:
        """Read all documents of a corpus.

        Raises:
            InvalidRequest: two documents have the same id, or as `Corpus`.
            NotFound: a path does not exist.
        """
        corpus = annotated(config)
        ids: list[str] = []
        texts: list[str] = []
        triples: list[str] = []
        for document in corpus.documents():
            ids.append(document.doc_id)
            texts.append(document.text)
            triples.append(document.metadata.get(TRIPLES, ""))
        return cls.of(ids, texts, triples)

    @classmethod
    def of(cls, ids: Sequence[str], texts: Sequence[str], triples: Sequence[str] | None = None) -> Sentences:
        """Sentences that are at hand.

        Raises:
            InvalidRequest: two have the same id.
        """
        triples = [""] * len(ids) if triples is None else triples
        digest = hashlib.sha256()
        positions: dict[str, int] = {}
        for position, (sentence_id, text, stated) in enumerate(zip(ids, texts, triples, strict=True)):
            if sentence_id in positions:
                raise twice(sentence_id, positions[sentence_id], position)
            positions[sentence_id] = position
            for part in (sentence_id, text, stated):
                digest.update(counted(part))
        return cls(ids=ids, texts=texts, triples=triples, digest=digest.hexdigest(), positions=positions)


def annotated(config: CorpusConfig) -> Corpus:
    """A corpus whose documents carry their annotated facts.

    Raises:
        NotFound, InvalidRequest: as `Corpus`.
    """
    return Corpus(config.model_copy(update={"metadata_fields": (*config.metadata_fields, TRIPLES)}))


def counted(text: str) -> bytes:
    """A text as it enters a digest: its length in bytes, then the bytes."""
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def twice(sentence_id: str, first: int, second: int) -> InvalidRequest:
    """The error about an id that two sentences have, at these positions."""
    return InvalidRequest(
        f"the corpus holds two sentences of the id {sentence_id!r} (numbers {first + 1:,} and {second + 1:,}); ids "
        "must be unique"
    )
