"""Validation: nothing a client can send escapes it, and every refusal names the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway import pages, validate
from services.gateway.validate import LIMITS
from tests.service.messages import messages
from trackstar.errors import InvalidRequest
from trackstar.v1 import common_pb2, generation_pb2, trace_pb2

_CHECKS: list[tuple[type[Message], Callable[[Any], Any]]] = [
    (trace_pb2.TraceRequest, validate.trace),
    (trace_pb2.TraceStreamRequest, validate.trace_stream),
    (trace_pb2.GetPassagesRequest, validate.passages),
    (trace_pb2.VerifyRequest, validate.verify),
    (generation_pb2.ListRequest, validate.list_generations),
    (generation_pb2.GetRequest, validate.get_generation),
    (generation_pb2.ActivateRequest, validate.activate),
]


def _is_field(kind: Any, dotted: str) -> bool:
    """Whether the dotted name leads to a field of the message."""
    descriptor = kind.DESCRIPTOR
    for name in dotted.split("."):
        if descriptor is None or name not in descriptor.fields_by_name:
            return False
        descriptor = descriptor.fields_by_name[name].message_type
    return True


@pytest.mark.parametrize(("kind", "check"), _CHECKS, ids=[kind.__name__ for kind, _ in _CHECKS])
def test_anything_is_accepted_or_refused_with_its_field(kind: type[Message], check: Callable[[Any], Any]) -> None:
    accepted = refused = 0

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
    @given(messages(kind))
    def try_one(message: Message) -> None:
        nonlocal accepted, refused
        try:
            check(kind.FromString(message.SerializeToString()))
        except InvalidRequest as error:
            refusal = error
        else:
            accepted += 1
            return
        assert refusal.field is not None, refusal
        assert _is_field(kind, refusal.field), refusal.field
        assert str(refusal).startswith(refusal.field)
        refused += 1

    try_one()
    assert refused
    assert accepted or kind is trace_pb2.TraceStreamRequest


def _query(**explained: Any) -> trace_pb2.Query:
    return trace_pb2.Query(prompt="The capital is", **(explained or {"target": "Paris"}))


def _filtered(content: dict[str, Any]) -> trace_pb2.TraceRequest:
    return trace_pb2.TraceRequest(query=_query(), filter=ParseDict(content, common_pb2.Filter()))


def test_defaults_are_filled_in() -> None:
    asked = validate.trace(trace_pb2.TraceRequest(query=_query(), generation="active"))
    assert (asked.k, asked.candidates, asked.page_size, asked.generation) == (10, 1000, 10, "")
    assert asked.opponents == (False, True)
    assert asked.filter is None
    assert validate.trace(trace_pb2.TraceRequest(query=_query(own=trace_pb2.OwnCompletion()))).query.own == (
        trace_pb2.OwnCompletion(max_new_tokens=8)
    )
    verified = validate.verify(
        trace_pb2.VerifyRequest(query=_query(), passage_ids=[3], optimizer=trace_pb2.PATCH_OPTIMIZER_ADAMW)
    )
    assert verified.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("query.target", trace_pb2.TraceRequest()),
        ("query.target", trace_pb2.TraceRequest(query=trace_pb2.Query(target=" \n"))),
        ("query.target", trace_pb2.TraceRequest(query=_query(target="x" * (LIMITS.target_bytes + 1)))),
        ("query.prompt", trace_pb2.TraceRequest(query=trace_pb2.Query(prompt="é" * (1 << 17) + "e", target="x"))),
        ("query.span.end", trace_pb2.TraceRequest(query=_query(span={"completion": "ab", "start": 0, "end": 3}))),
        ("query.span.start", trace_pb2.TraceRequest(query=_query(span={"completion": "ab", "start": 1, "end": 1}))),
        ("query.own.max_new_tokens", trace_pb2.TraceRequest(query=_query(own={"max_new_tokens": 257}))),
        ("k", trace_pb2.TraceRequest(query=_query(), k=1001)),
        ("candidates", trace_pb2.TraceRequest(query=_query(), candidates=16_385)),
        ("candidates", trace_pb2.TraceRequest(query=_query(), k=10, candidates=9)),
        ("generation", trace_pb2.TraceRequest(query=_query(), generation="../../etc")),
        ("request_id", trace_pb2.TraceRequest(query=_query(), request_id="é")),
        ("request_id", trace_pb2.TraceRequest(query=_query(), request_id="x" * 129)),
        ("filter.date_from", _filtered({"date_from": "2019-02-29"})),
        (
            "filter.date_from",
            _filtered({"date_from": "2020", "date_until": "2019-05"}),
        ),
        ("filter.metadata.values", _filtered({"metadata": [{"field": "a"}]})),
        (
            "filter.metadata.field",
            _filtered({"metadata": [{"field": "a", "values": ["b"]}] * 2}),
        ),
    ],
)
def test_each_limit_names_its_field(field: str, request_: trace_pb2.TraceRequest) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate.trace(request_)
    assert caught.value.field == field


def test_dates_of_different_length_are_compared_by_what_they_cover() -> None:
    asked = validate.trace(_filtered({"date_from": "2019-05", "date_until": "2019"}))
    assert asked.filter == common_pb2.Filter(date_from="2019-05", date_until="2019")


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1e-9, 1.5])
def test_learning_rates_that_are_none(rate: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate.verify(trace_pb2.VerifyRequest(query=_query(), passage_ids=[1], learning_rate=rate))
    assert caught.value.field == "learning_rate"


def test_the_digest_follows_everything_but_the_page() -> None:
    base = trace_pb2.TraceRequest(query=_query(), k=20)
    digest = validate.trace(base).digest
    for same in (
        {"page_size": 5},
        {"request_id": "another"},
        {"page_token": "x"},
        {"ends": trace_pb2.ENDS_BOTH},
        {"candidates": 1000},
    ):
        assert validate.trace(trace_pb2.TraceRequest(query=_query(), k=20, **same)).digest == digest
    for other in ({"ends": trace_pb2.ENDS_OPPONENTS}, {"candidates": 999}, {"complete": True}, {"exactness": 2}):
        assert validate.trace(trace_pb2.TraceRequest(query=_query(), k=20, **other)).digest != digest


@given(st.text(max_size=60), st.binary(min_size=16, max_size=16), st.integers(0, 1 << 40), st.data())
def test_page_tokens_come_back_or_are_refused(name: str, digest: bytes, offset: int, data: st.DataObject) -> None:
    token = pages.PageToken(generation=name, digest=digest, offset=offset)
    text = token.encode()
    assert pages.decode(text, generation="", digest=digest) == token
    assert pages.decode(text, generation=name, digest=digest) == token
    position = data.draw(st.integers(0, len(text) - 1))
    garbled = text[:position] + data.draw(st.characters(codec="utf-8")) + text[position + 1 :]
    for bad in (garbled, text[:position], "", text + "A", data.draw(st.text(max_size=80))):
        # Base64 ignores bits beyond the last byte, so another text can be the same token.
        if pages._parse(bad) == token:
            continue
        with pytest.raises(InvalidRequest) as caught:
            pages.decode(bad, generation="", digest=digest)
        assert caught.value.field == "page_token"
    with pytest.raises(InvalidRequest):
        pages.decode(text, generation="", digest=bytes(reversed(digest)) if digest != digest[::-1] else b"\xff" * 16)
    with pytest.raises(InvalidRequest):
        pages.decode(text, generation=f"{name}x", digest=digest)


def test_rankings_are_forgotten_in_the_order_of_their_use() -> None:
    kept: pages.RecentRankings[int] = pages.RecentRankings(2)
    kept.put("a", b"1", 1)
    kept.put("a", b"2", 2)
    assert kept.get("a", b"1") == 1
    kept.put("b", b"1", 3)
    assert (kept.get("a", b"1"), kept.get("a", b"2"), kept.get("b", b"1")) == (1, None, 3)
