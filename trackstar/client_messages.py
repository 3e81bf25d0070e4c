"""The client's values as messages, and messages as its values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from trackstar.client_types import (
    ALL_EVIDENCE,
    Answer,
    CoarsePart,
    DonePart,
    EncodedPart,
    Ends,
    EvidenceKind,
    EvidencePart,
    Exactness,
    Explained,
    Filter,
    GenerationInfo,
    Optimizer,
    Own,
    PassagePage,
    PatchEffect,
    Provenance,
    RankedPart,
    Span,
    State,
    TracePart,
    Verification,
)
from trackstar.errors import InvalidRequest
from trackstar.passages import Passage
from trackstar.results import Evidence, Influence, Query, Trace
from trackstar.v1 import common_pb2, generation_pb2, trace_pb2

_ENDS: dict[Ends, trace_pb2.Ends.ValueType] = {
    "both": trace_pb2.ENDS_BOTH,
    "proponents": trace_pb2.ENDS_PROPONENTS,
    "opponents": trace_pb2.ENDS_OPPONENTS,
}
_EXACTNESS: dict[Exactness, common_pb2.Exactness.ValueType] = {
    "auto": common_pb2.EXACTNESS_UNSPECIFIED,
    "cascade": common_pb2.EXACTNESS_CASCADE,
    "exhaustive": common_pb2.EXACTNESS_EXHAUSTIVE,
}
_OPTIMIZERS: dict[Optimizer, trace_pb2.PatchOptimizer.ValueType] = {
    "sgd": trace_pb2.PATCH_OPTIMIZER_SGD,
    "adamw": trace_pb2.PATCH_OPTIMIZER_ADAMW,
}
_STATES: dict[int, State] = {
    generation_pb2.GENERATION_STATE_BUILDING: "building",
    generation_pb2.GENERATION_STATE_READY: "ready",
    generation_pb2.GENERATION_STATE_ACTIVE: "active",
}
_NAMES_OF_EXACTNESS = {number: name for name, number in _EXACTNESS.items()}


def query_message(prompt: str, explained: str | Span | Own) -> trace_pb2.Query:
    """What is to be explained.

    Raises:
        InvalidRequest: numbers or texts that no message can hold.
    """
    try:
        match explained:
            case str():
                return trace_pb2.Query(prompt=prompt, target=explained)
            case Span():
                span = trace_pb2.CompletionSpan(
                    completion=explained.completion, start=explained.start, end=explained.end
                )
                return trace_pb2.Query(prompt=prompt, span=span)
            case Own():
                return trace_pb2.Query(
                    prompt=prompt, own=trace_pb2.OwnCompletion(max_new_tokens=explained.max_new_tokens)
                )
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"query: {error}", field="query") from error


def trace_message(
    prompt: str,
    explained: str | Span | Own,
    *,
    generation: str = "",
    k: int = 0,
    ends: Ends = "both",
    filter: Filter | None = None,
    evidence: Iterable[EvidenceKind] = ALL_EVIDENCE,
    exactness: Exactness = "auto",
    candidates: int = 0,
    complete: bool = False,
    request_id: str = "",
    page_size: int = 0,
    page_token: str = "",
) -> trace_pb2.TraceRequest:
    """A request for a trace.

    Raises:
        InvalidRequest: numbers or texts that no message can hold, or an option that there is not.
    """
    wanted = set(evidence)
    try:
        return trace_pb2.TraceRequest(
            request_id=request_id,
            query=query_message(prompt, explained),
            generation=generation,
            k=k,
            ends=_ENDS[ends],
            filter=None if filter is None else filter_message(filter),
            evidence=trace_pb2.EvidenceOptions(
                tokens="tokens" in wanted, blocks="blocks" in wanted, overlap="overlap" in wanted
            ),
            exactness=_EXACTNESS[exactness],
            candidates=candidates,
            complete=complete,
            page_size=page_size,
            page_token=page_token,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error


def filter_message(filter: Filter) -> common_pb2.Filter:
    """A filter."""
    return common_pb2.Filter(
        sources=filter.sources,
        date_from=filter.date_from,
        date_until=filter.date_until,
        date_field=filter.date_field,
        metadata=[common_pb2.MetadataCondition(field=name, values=values) for name, values in filter.metadata.items()],
    )


def passages_message(
    passage_ids: Sequence[int],
    *,
    generation: str,
    doc_id: str,
    filter: Filter | None,
    page_size: int,
    page_token: str,
    request_id: str,
) -> trace_pb2.GetPassagesRequest:
    """A request for passages.

    Raises:
        InvalidRequest: numbers or texts that no message can hold.
    """
    try:
        return trace_pb2.GetPassagesRequest(
            request_id=request_id,
            generation=generation,
            passage_ids=passage_ids,
            doc_id=doc_id,
            filter=None if filter is None else filter_message(filter),
            page_size=page_size,
            page_token=page_token,
        )
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error


def verify_message(
    prompt: str,
    explained: str | Span | Own,
    passage_ids: Sequence[int],
    *,
    generation: str,
    optimizer: Optimizer,
    learning_rate: float,
    request_id: str,
) -> trace_pb2.VerifyRequest:
    """A request for tail-patch effects.

    Raises:
        InvalidRequest: numbers or texts that no message can hold, or an optimizer that there is not.
    """
    try:
        return trace_pb2.VerifyRequest(
            request_id=request_id,
            query=query_message(prompt, explained),
            generation=generation,
            passage_ids=passage_ids,
            optimizer=_OPTIMIZERS[optimizer],
            learning_rate=learning_rate,
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequest(f"the request cannot be sent: {error}") from error


def to_answer(response: trace_pb2.TraceResponse, *, query_id: str, prompt: str) -> Answer:
    """An answer; the trace's query has the explained words as its target."""
    provenance = to_provenance(response.provenance)
    return Answer(
        trace=Trace(
            query=Query(query_id=query_id or response.request_id, prompt=prompt, target=response.target.text),
            proponents=to_influences(response.proponents),
            opponents=to_influences(response.opponents),
            loss=response.target.loss,
            background_mean=response.background.mean,
            background_std=response.background.std,
            generation=provenance.generation,
            exact=provenance.exactness == "exhaustive",
            examined=provenance.candidates_examined,
            seconds=dict(provenance.seconds),
        ),
        explained=to_explained(response.target),
        provenance=provenance,
        request_id=response.request_id,
        next_page_token=response.next_page_token,
    )


class Assembly:
    """Puts a stream's parts together again."""

    def __init__(self, *, query_id: str, prompt: str) -> None:
        self._query_id = query_id
        self._prompt = prompt
        self._whole = trace_pb2.TraceResponse()

    def add(self, part: trace_pb2.TraceStreamResponse) -> TracePart | None:
        """The part as a value; None for a kind that this version does not know."""
        match part.WhichOneof("part"):
            case "encoded":
                self._whole.request_id = part.encoded.request_id
                return EncodedPart(
                    request_id=part.encoded.request_id,
                    generation=part.encoded.generation,
                    explained=to_explained(part.encoded.target),
                )
            case "coarse":
                return CoarsePart(
                    proponents=tuple((hit.passage_id, hit.estimate) for hit in part.coarse.proponents),
                    opponents=tuple((hit.passage_id, hit.estimate) for hit in part.coarse.opponents),
                )
            case "reranked":
                return RankedPart(
                    proponents=to_influences(part.reranked.proponents),
                    opponents=to_influences(part.reranked.opponents),
                    candidates_examined=part.reranked.candidates_examined,
                    final=part.reranked.final,
                )
            case "evidence":
                self._whole.proponents.extend(part.evidence.proponents)
                self._whole.opponents.extend(part.evidence.opponents)
                return EvidencePart(
                    proponents=to_influences(part.evidence.proponents),
                    opponents=to_influences(part.evidence.opponents),
                )
            case "done":
                self._whole.target.CopyFrom(part.done.target)
                self._whole.background.CopyFrom(part.done.background)
                self._whole.provenance.CopyFrom(part.done.provenance)
                return DonePart(answer=to_answer(self._whole, query_id=self._query_id, prompt=self._prompt))
        return None


def to_influences(found: Iterable[common_pb2.Influence]) -> tuple[Influence, ...]:
    """One ranking."""
    return tuple(
        Influence(
            rank=item.rank,
            passage=to_passage(item.passage),
            score=item.score,
            z_score=item.z_score,
            evidence=_evidence(item.evidence) if item.HasField("evidence") else None,
        )
        for item in found
    )


def to_passage(found: common_pb2.Passage) -> Passage:
    """A passage; its tokens stay with the server."""
    return Passage(
        passage_id=found.passage_id,
        doc_id=found.doc_id,
        text=found.text,
        source=found.source,
        metadata=dict(found.metadata),
        token_start=found.token_start,
        token_end=found.token_end,
        tokens=np.empty(0, dtype=np.int32),
    )


def to_explained(found: trace_pb2.ExplainedTarget) -> Explained:
    """How the query was read."""
    return Explained(
        text=found.text,
        loss=found.loss,
        probability=found.probability,
        num_tokens=found.num_tokens,
        model_completion=found.model_completion,
    )


def to_provenance(found: common_pb2.Provenance) -> Provenance:
    """Where an answer comes from."""
    return Provenance(
        generation=found.generation,
        checkpoint_digest=found.checkpoint_digest,
        config_digest=found.config_digest,
        exactness=_NAMES_OF_EXACTNESS.get(found.exactness, "auto"),
        candidates_examined=found.candidates_examined,
        passages_total=found.passages_total,
        seconds={item.stage: item.seconds for item in found.stages},
        left_out=tuple(found.left_out),
    )


def to_passages(found: trace_pb2.GetPassagesResponse) -> PassagePage:
    """A page of passages."""
    return PassagePage(
        passages=tuple(to_passage(item) for item in found.passages),
        generation=found.generation,
        next_page_token=found.next_page_token,
    )


def to_verification(found: trace_pb2.VerifyResponse) -> Verification:
    """Tail-patch effects."""
    return Verification(
        effects=tuple(
            PatchEffect(
                passage_id=item.passage_id,
                probability_before=item.probability_before,
                probability_after=item.probability_after,
                loss_before=item.loss_before,
                loss_after=item.loss_after,
            )
            for item in found.effects
        ),
        learning_rate=found.learning_rate,
        provenance=to_provenance(found.provenance),
        request_id=found.request_id,
    )


def to_generation(found: generation_pb2.Generation) -> GenerationInfo:
    """A generation."""
    return GenerationInfo(
        name=found.name,
        state=_STATES.get(found.state, "unknown"),
        checkpoint_digest=found.checkpoint_digest,
        config_digest=found.config_digest,
        num_passages=found.num_passages,
        dim=found.dim,
        mix=found.mix,
        mix_weight=found.mix_weight,
        damping=found.damping,
        code_kind=found.code_kind,
        code_size=found.code_size,
    )


def _evidence(found: common_pb2.Evidence) -> Evidence:
    return Evidence(
        tokens=tuple((item.text, item.contribution) for item in found.tokens),
        blocks=tuple((item.block, item.contribution) for item in found.blocks),
        overlap=found.overlap,
    )
