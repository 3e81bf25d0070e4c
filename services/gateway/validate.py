"""Requests as they may be: every field checked against one table of limits, defaults filled in.

Contract: whatever bytes a message was parsed from, the answer is either a value that the rest of the gateway can rely
on or an `InvalidRequest` whose `field` is the dotted name of the field at fault. Nothing is looked up: whether a
generation or a passage exists is for others to say.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from trackstar.errors import InvalidRequest
from trackstar.v1 import common_pb2, generation_pb2, trace_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest of everything; sizes of texts in bytes of UTF-8."""

    k: int = 1000
    candidates: int = 16_384
    page_size: int = 1000
    passage_ids: int = 1000
    verified_passages: int = 100
    new_tokens: int = 256
    prompt_bytes: int = 1 << 18
    target_bytes: int = 1 << 16
    completion_bytes: int = 1 << 18
    id_characters: int = 128
    token_characters: int = 512
    doc_id_bytes: int = 4096
    sources: int = 100
    conditions: int = 16
    values: int = 100
    value_bytes: int = 1024
    field_bytes: int = 256
    learning_rate: float = 1.0


LIMITS = Limits()
_DEFAULT_K, _DEFAULT_CANDIDATES, _DEFAULT_PAGE, _DEFAULT_NEW_TOKENS = 10, 1000, 100, 8
_DEFAULT_RATES = {trace_pb2.PATCH_OPTIMIZER_SGD: 1e-3, trace_pb2.PATCH_OPTIMIZER_ADAMW: 1e-5}
_OPPONENTS: dict[int, tuple[bool, ...]] = {
    trace_pb2.ENDS_UNSPECIFIED: (False, True),
    trace_pb2.ENDS_BOTH: (False, True),
    trace_pb2.ENDS_PROPONENTS: (False,),
    trace_pb2.ENDS_OPPONENTS: (True,),
}
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DATE = re.compile(r"[0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?")
ACTIVE = "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedTrace:
    """A trace that can be answered.

    generation: a concrete name, or "" for the active one. opponents: for each ranking, whether it is of opponents.
    filter: None where everything passes. page_size: passages per ranking in one answer. digest: of everything that
    decides the whole answer but the generation, so that a page token fits this request alone.
    """

    request_id: str
    query: trace_pb2.Query
    generation: str
    k: int
    opponents: tuple[bool, ...]
    filter: common_pb2.Filter | None
    evidence: trace_pb2.EvidenceOptions
    exactness: common_pb2.Exactness.ValueType
    candidates: int
    complete: bool
    page_size: int
    page_token: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedPassages:
    """Passages by `passage_ids`, or if there are none those of `doc_id` (if any) that pass `filter` (if any)."""

    request_id: str
    generation: str
    passage_ids: tuple[int, ...]
    doc_id: str
    filter: common_pb2.Filter | None
    page_size: int
    page_token: str
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedVerify:
    """A training step on each of the distinct `passage_ids`."""

    request_id: str
    query: trace_pb2.Query
    generation: str
    passage_ids: tuple[int, ...]
    optimizer: trace_pb2.PatchOptimizer.ValueType
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedList:
    """A page of generations."""

    page_size: int
    page_token: str


def trace(request: trace_pb2.TraceRequest) -> AskedTrace:
    """Check a request for a trace.

    Raises:
        InvalidRequest: with the field at fault.
    """
    opponents = _OPPONENTS.get(request.ends)
    if opponents is None:
        raise InvalidRequest(f"ends: there is no value {request.ends}", field="ends")
    if request.exactness not in common_pb2.Exactness.values():
        raise InvalidRequest(f"exactness: there is no value {request.exactness}", field="exactness")
    k = _count("k", request.k, default=_DEFAULT_K, limit=LIMITS.k)
    candidates = _count("candidates", request.candidates, default=max(k, _DEFAULT_CANDIDATES), limit=LIMITS.candidates)
    if candidates < k:
        raise InvalidRequest(f"candidates: {candidates:,} are fewer than k = {k:,}; ask for more", field="candidates")
    asked = trace_pb2.TraceRequest(
        query=_query(request),
        k=k,
        ends=request.ends or trace_pb2.ENDS_BOTH,
        filter=_filter(request),
        evidence=trace_pb2.EvidenceOptions(
            tokens=request.evidence.tokens, blocks=request.evidence.blocks, overlap=request.evidence.overlap
        ),
        exactness=request.exactness,
        candidates=candidates,
        complete=request.complete,
    )
    return AskedTrace(
        request_id=_request_id(request.request_id),
        query=asked.query,
        generation=_generation(request.generation),
        k=k,
        opponents=opponents,
        filter=asked.filter if asked.HasField("filter") else None,
        evidence=asked.evidence,
        exactness=asked.exactness,
        candidates=candidates,
        complete=request.complete,
        page_size=min(k, _count("page_size", request.page_size, default=k, limit=LIMITS.page_size)),
        page_token=_page_token(request.page_token),
        digest=_digest(asked),
    )


def trace_stream(request: trace_pb2.TraceStreamRequest) -> AskedTrace:
    """Check a request for a trace in parts; its fields are named as `trace.query.target`.

    Raises:
        InvalidRequest: with the field at fault.
    """
    try:
        for name in ("page_size", "page_token"):
            if getattr(request.trace, name):
                raise InvalidRequest(f"{name}: pages are not streamed; leave it out, or use Trace", field=name)
        return trace(request.trace)
    except InvalidRequest as error:
        raise InvalidRequest(f"trace.{error}", field=f"trace.{error.field}") from error


def passages(request: trace_pb2.GetPassagesRequest) -> AskedPassages:
    """Check a request for passages.

    Raises:
        InvalidRequest: with the field at fault.
    """
    ids = _ids(request.passage_ids, limit=LIMITS.passage_ids)
    chosen = _filter(request)
    if ids and (request.doc_id or chosen is not None):
        raise InvalidRequest("passage_ids: give either ids, or doc_id and filter to list", field="passage_ids")
    if ids and request.page_token:
        raise InvalidRequest("page_token: passages asked for by id come in one page", field="page_token")
    doc_id = _text("doc_id", request.doc_id, limit=LIMITS.doc_id_bytes)
    return AskedPassages(
        request_id=_request_id(request.request_id),
        generation=_generation(request.generation),
        passage_ids=ids,
        doc_id=doc_id,
        filter=chosen,
        page_size=_count("page_size", request.page_size, default=_DEFAULT_PAGE, limit=LIMITS.page_size),
        page_token=_page_token(request.page_token),
        digest=_digest(trace_pb2.GetPassagesRequest(doc_id=doc_id, filter=chosen)),
    )


def verify(request: trace_pb2.VerifyRequest) -> AskedVerify:
    """Check a request for tail-patch effects.

    Raises:
        InvalidRequest: with the field at fault.
    """
    ids = _ids(request.passage_ids, limit=LIMITS.verified_passages)
    if not ids:
        raise InvalidRequest("passage_ids: name the passages to take a step on", field="passage_ids")
    if len(set(ids)) < len(ids):
        raise InvalidRequest("passage_ids: name every passage once", field="passage_ids")
    optimizer = request.optimizer or trace_pb2.PATCH_OPTIMIZER_SGD
    if optimizer not in _DEFAULT_RATES:
        raise InvalidRequest(f"optimizer: there is no value {optimizer}", field="optimizer")
    rate = request.learning_rate
    # Written so that NaN is refused too.
    if not 0 <= rate <= LIMITS.learning_rate:
        raise InvalidRequest(
            f"learning_rate: must lie between 0 and {LIMITS.learning_rate:g}, not {rate:g}", field="learning_rate"
        )
    return AskedVerify(
        request_id=_request_id(request.request_id),
        query=_query(request),
        generation=_generation(request.generation),
        passage_ids=ids,
        optimizer=optimizer,
        learning_rate=rate or _DEFAULT_RATES[optimizer],
    )


def list_generations(request: generation_pb2.ListRequest) -> AskedList:
    """Check a request for a list of generations.

    Raises:
        InvalidRequest: with the field at fault.
    """
    return AskedList(
        page_size=_count("page_size", request.page_size, default=_DEFAULT_PAGE, limit=LIMITS.page_size),
        page_token=_page_token(request.page_token),
    )


def get_generation(request: generation_pb2.GetRequest) -> str:
    """The name asked for, "" for the active one.

    Raises:
        InvalidRequest: with the field at fault.
    """
    return _generation(request.name, field="name")


def activate(request: generation_pb2.ActivateRequest) -> str:
    """The name of the generation to activate.

    Raises:
        InvalidRequest: with the field at fault.
    """
    name = _generation(request.name, field="name")
    if not name:
        raise InvalidRequest("name: name the generation that is to answer", field="name")
    return name


def _query(request: trace_pb2.TraceRequest | trace_pb2.VerifyRequest) -> trace_pb2.Query:
    """A query with every default filled in and nothing unknown in it."""
    query = request.query
    asked = trace_pb2.Query(prompt=_text("query.prompt", query.prompt, limit=LIMITS.prompt_bytes))
    match query.WhichOneof("explained"):
        case "target":
            if not query.target.strip():
                raise InvalidRequest(
                    "query.target: the target is empty; say which words are to be explained", field="query.target"
                )
            asked.target = _text("query.target", query.target, limit=LIMITS.target_bytes)
        case "span":
            asked.span.CopyFrom(_span(query.span))
        case "own":
            tokens = _count(
                "query.own.max_new_tokens",
                query.own.max_new_tokens,
                default=_DEFAULT_NEW_TOKENS,
                limit=LIMITS.new_tokens,
            )
            asked.own.max_new_tokens = tokens
        case _:
            raise InvalidRequest(
                "query.target: say what is to be explained: a target, a span of a completion, or the model's own words",
                field="query.target",
            )
    return asked


def _span(span: trace_pb2.CompletionSpan) -> trace_pb2.CompletionSpan:
    completion = _text("query.span.completion", span.completion, limit=LIMITS.completion_bytes)
    if not completion:
        raise InvalidRequest("query.span.completion: the completion is empty", field="query.span.completion")
    if span.start >= span.end:
        raise InvalidRequest(
            f"query.span.start: the span is empty, it starts at {span.start} and ends at {span.end}",
            field="query.span.start",
        )
    if span.end > len(completion):
        raise InvalidRequest(
            f"query.span.end: {span.end} lies behind the completion's {len(completion)} characters",
            field="query.span.end",
        )
    return trace_pb2.CompletionSpan(completion=completion, start=span.start, end=span.end)


def _filter(request: trace_pb2.TraceRequest | trace_pb2.GetPassagesRequest) -> common_pb2.Filter | None:
    """A filter without anything unknown in it; None if everything passes."""
    found = request.filter
    if len(found.sources) > LIMITS.sources:
        raise InvalidRequest(f"filter.sources: at most {LIMITS.sources} sources", field="filter.sources")
    if len(found.metadata) > LIMITS.conditions:
        raise InvalidRequest(f"filter.metadata: at most {LIMITS.conditions} conditions", field="filter.metadata")
    conditions: dict[str, list[str]] = {}
    for condition in found.metadata:
        name = _text("filter.metadata.field", condition.field, limit=LIMITS.field_bytes)
        if not name or name in conditions:
            what = f"{name!r} comes twice; join its values" if name else "name the field of the condition"
            raise InvalidRequest(f"filter.metadata.field: {what}", field="filter.metadata.field")
        if not 1 <= len(condition.values) <= LIMITS.values:
            raise InvalidRequest(
                f"filter.metadata.values: give between 1 and {LIMITS.values} values of {name!r}",
                field="filter.metadata.values",
            )
        conditions[name] = [
            _text("filter.metadata.values", value, limit=LIMITS.value_bytes) for value in condition.values
        ]
    from_, until = (_date(f"filter.{name}", getattr(found, name)) for name in ("date_from", "date_until"))
    if from_ and until and from_ > until and not from_.startswith(until):
        raise InvalidRequest(f"filter.date_from: {from_} lies behind {until}", field="filter.date_from")
    date_field = _text("filter.date_field", found.date_field, limit=LIMITS.field_bytes)
    asked = common_pb2.Filter(
        sources=[_text("filter.sources", source, limit=LIMITS.value_bytes) for source in found.sources],
        date_from=from_,
        date_until=until,
        date_field=date_field if from_ or until else "",
        metadata=[common_pb2.MetadataCondition(field=name, values=values) for name, values in conditions.items()],
    )
    return asked if asked.ByteSize() else None


def _date(field: str, text: str) -> str:
    """A date or a prefix of one that is on the calendar."""
    if not text:
        return ""
    try:
        if not _DATE.fullmatch(text):
            raise ValueError(text)
        date.fromisoformat(text + "0000-01-01"[len(text) :])
    except ValueError as error:
        raise InvalidRequest(f"{field}: give 2019, 2019-05 or 2019-05-30, not {text[:40]!r}", field=field) from error
    return text


def _ids(ids: Sequence[int], *, limit: int) -> tuple[int, ...]:
    if len(ids) > limit:
        raise InvalidRequest(f"passage_ids: at most {limit:,} at once, not {len(ids):,}", field="passage_ids")
    if any(passage_id < 0 for passage_id in ids):
        raise InvalidRequest(f"passage_ids: {min(ids)} is below 0; ids are row numbers", field="passage_ids")
    return tuple(ids)


def _count(field: str, value: int, *, default: int, limit: int) -> int:
    """A number that stands for its default where it is 0."""
    if value > limit:
        raise InvalidRequest(f"{field}: at most {limit:,}, not {value:,}", field=field)
    return value or default


def _text(field: str, value: str, *, limit: int) -> str:
    if len(value) > limit or len(value.encode()) > limit:
        raise InvalidRequest(f"{field}: is longer than {limit:,} bytes", field=field)
    return value


def _request_id(value: str) -> str:
    if len(value) > LIMITS.id_characters or not value.isascii() or not value.isprintable():
        raise InvalidRequest(
            f"request_id: at most {LIMITS.id_characters} printable ASCII characters", field="request_id"
        )
    return value


def _generation(value: str, *, field: str = "generation") -> str:
    """A concrete name, or "" for the active one."""
    if value in ("", ACTIVE):
        return ""
    if len(value) > LIMITS.id_characters or not _NAME.fullmatch(value):
        raise InvalidRequest(f"{field}: {value[:40]!r} cannot name a generation", field=field)
    return value


def _page_token(value: str) -> str:
    if len(value) > LIMITS.token_characters:
        raise InvalidRequest("page_token: this is no token that an answer gave", field="page_token")
    return value


def _digest(asked: trace_pb2.TraceRequest | trace_pb2.GetPassagesRequest) -> bytes:
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).digest()[:16]
