"""The corpus of an evaluation: its sentences in order, each known by its position.

Contract: positions are those of the documents in the corpus, from 0, and every method answers with them; so ties can be
broken by position whatever a method works on. Ids are unique. Texts are held in memory, as lexical retrieval needs
them anyway. `digest` is of all ids, texts and annotations, wherever the files lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    positions: dict[str, int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, config: CorpusConfig) -> Sentences:
        """Read all documents of a corpus.

        Raises:
            InvalidRequest: two documents have the same id, or as `Corpus`.
            NotFound: a path does not exist.
        """
        corpus = Corpus(config.model_copy(update={"metadata_fields": (*config.metadata_fields, TRIPLES)}))
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
                raise InvalidRequest(
                    f"the corpus holds two sentences of the id {sentence_id!r} (numbers {positions[sentence_id] + 1:,} "
                    f"and {position + 1:,}); ids must be unique"
                )
            positions[sentence_id] = position
            for part in (sentence_id, text, stated):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        return cls(ids=ids, texts=texts, triples=triples, digest=digest.hexdigest(), positions=positions)
