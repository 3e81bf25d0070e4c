"""Turns traces into records: the JSONL format of the paper's data release, and a plain dictionary for `--json`.

Contract: `release_record` has the release's keys with the release's meanings; what the release has no place for stands
under the one key "trackstar". A query's own release fields (fact, relation, frequencies, the 8B model's answers) are
carried over; what the release says about its own proponents is not, because ours are others. Everything returned is
plain JSON, and numbers are not rounded.

It writes no files and runs no model: it needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trackstar.passages import Passage
    from trackstar.results import Evidence, Influence, Query, Trace

# Fields of the release's query and fact records that stay true whoever traces the query.
_CARRIED = (
    "fact_id",
    "kilt_id",
    "relation",
    "relation_uri",
    "entity0",
    "entity0_uri",
    "entity0_alias",
    "entity1",
    "entity1_uri",
    "entity1_alias",
    "prompt0",
    "prompt1",
    "prompt2",
    "groundtruth",
    "c4_frequency",
    "c4_frequency_bucket",
    "is_repetition",
    "has_trex_sentence",
    "trex_sentences",
    "8b_generations",
    "8b_confidence",
    "is_8b_correct",
)


def release_record(trace: Trace, *, query_set: str = "queries") -> dict[str, Any]:
    """One line of the release's JSONL.

    Args:
        trace: the answer to one query.
        query_set: the record's `query_set`, unless the query's own fields name one.

    Returns:
        `example_id, query_set, inputs_plaintext, targets_plaintext`, the query's own release fields (for a fact without
        `groundtruth` that is its `entity1`), `proponents` (texts), `proponent_ids` (the corpus's own ids),
        `proponent_scores`, the same three for opponents, and our extras under "trackstar".
    """
    return {
        **_asked(trace.query, query_set),
        **_end("proponent", trace.proponents),
        **_end("opponent", trace.opponents),
        "trackstar": {
            **_extras("proponent", trace.proponents),
            **_extras("opponent", trace.opponents),
            "background_mean": trace.background_mean,
            "background_std": trace.background_std,
            "loss": trace.loss,
            "generation": trace.generation,
            "exact": trace.exact,
            "examined": trace.examined,
            "seconds": dict(trace.seconds),
        },
    }


def retrieval_record(
    query: Query,
    *,
    texts: Sequence[str],
    ids: Sequence[str],
    scores: Sequence[float],
    correct: Sequence[bool] | None,
    ais_scores: Sequence[float] | None = None,
    query_set: str,
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of the release's JSONL for what any retrieval method found, which has no opponents.

    Args:
        query: what was asked.
        texts: of the passages found, best first.
        ids: the corpus's own.
        scores: by whatever scale the method has.
        correct: whether each passage states the fact, where that is known; the record's `proponent_correct`.
        ais_scores: how surely, from 0 to 1, where that is known; the record's `proponent_ais_scores`.
        query_set: as of `release_record`.
        extras: what goes under "trackstar".
    """
    return {
        **_asked(query, query_set),
        "proponents": list(texts),
        "proponent_ids": list(ids),
        "proponent_scores": list(scores),
        **({} if correct is None else {"proponent_correct": list(correct)}),
        **({} if ais_scores is None else {"proponent_ais_scores": list(ais_scores)}),
        "opponents": [],
        "opponent_ids": [],
        "opponent_scores": [],
        "trackstar": dict(extras),
    }


def to_dict(trace: Trace) -> dict[str, Any]:
    """Everything a trace holds, for `trackstar trace --json`; `probability` is exp(-loss), that of the whole target."""
    return {
        "query": {"query_id": trace.query.query_id, "prompt": trace.query.prompt, "target": trace.query.target},
        "loss": trace.loss,
        "probability": math.exp(-trace.loss),
        "proponents": [_influence(item) for item in trace.proponents],
        "opponents": [_influence(item) for item in trace.opponents],
        "background": {"mean": trace.background_mean, "std": trace.background_std},
        "generation": trace.generation,
        "exact": trace.exact,
        "examined": trace.examined,
        "seconds": dict(trace.seconds),
    }


def _asked(query: Query, query_set: str) -> dict[str, Any]:
    """The part of a record that tells the query."""
    fields = query.fields
    carried = {name: fields[name] for name in _CARRIED if name in fields}
    if "groundtruth" not in carried and "entity1" in carried:
        carried["groundtruth"] = carried["entity1"]
    return {
        "example_id": query.query_id,
        "query_set": str(fields.get("query_set", query_set)),
        "inputs_plaintext": query.prompt,
        "targets_plaintext": query.target,
        **carried,
    }


def _end(name: str, influences: Sequence[Influence]) -> dict[str, Any]:
    return {
        f"{name}s": [item.passage.text for item in influences],
        f"{name}_ids": [item.passage.doc_id for item in influences],
        f"{name}_scores": [item.score for item in influences],
    }


def _extras(name: str, influences: Sequence[Influence]) -> dict[str, Any]:
    return {
        f"{name}_passage_ids": [item.passage.passage_id for item in influences],
        f"{name}_z_scores": [item.z_score for item in influences],
    }


def _influence(item: Influence) -> dict[str, Any]:
    return {
        "rank": item.rank,
        "score": item.score,
        "z_score": item.z_score,
        "passage": _passage(item.passage),
        "evidence": None if item.evidence is None else _evidence(item.evidence),
    }


def _passage(passage: Passage) -> dict[str, Any]:
    return {
        "passage_id": passage.passage_id,
        "doc_id": passage.doc_id,
        "source": passage.source,
        "metadata": dict(passage.metadata),
        "token_start": passage.token_start,
        "token_end": passage.token_end,
        "text": passage.text,
    }


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {
        "overlap": evidence.overlap,
        "tokens": _shares("text", evidence.tokens),
        "blocks": _shares("block", evidence.blocks),
    }


def _shares(label: str, shares: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{label: name, "contribution": share} for name, share in shares]
