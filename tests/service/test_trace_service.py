"""Traces over real gRPC against honest backends: rankings, filters, pages, parts and what is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from services.gateway.request import Principal
from tests.service import honest
from tests.service.honest import NUM, Gateway, HonestEncoder, HonestReranker, make_index, passage, passes, serving
from trackstar.catalog import Catalog
from trackstar.errors import InvalidRequest, NotFound, NotReady, Overloaded, PermissionDenied, TrackstarError
from trackstar.rpc_errors import from_call
from trackstar.v1 import common_pb2, trace_pb2

_TEXT = "Paris"
_ORDER = ["encoded", "coarse", "reranked", "evidence", "done"]


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_index(tmp_path, "alpha", "beta", active="alpha")


def _request(**fields: Any) -> trace_pb2.TraceRequest:
    query = fields.pop("query", trace_pb2.Query(prompt="The capital is", target=_TEXT))
    return trace_pb2.TraceRequest(query=query, **fields)


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def _refusal(call: Any) -> TrackstarError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is not grpc.StatusCode.INTERNAL, caught.value.details()
    return from_call(caught.value)


def _best(
    k: int, *, opponents: bool, generation: str = "alpha", text: str = _TEXT, chosen: common_pb2.Filter | None = None
) -> list[tuple[int, float]]:
    """The right ranking of every passage that passes."""
    scores = honest.scores_of(generation, text)
    ids = np.array([i for i in range(NUM) if passes(i, chosen or common_pb2.Filter())], dtype=np.int64)
    order = np.lexsort((ids, scores[ids] if opponents else -scores[ids]))[:k]
    return [(int(i), float(scores[i])) for i in ids[order]]


def _of_cascade(k: int, candidates: int, *, opponents: bool) -> list[tuple[int, float]]:
    """The right ranking of what the coarse search proposes."""
    scores = honest.scores_of("alpha", _TEXT)
    rows = honest.rows_of("alpha")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    estimates = unit[:, : honest.SIZE] @ honest.query_vector(_TEXT)[: honest.SIZE] * (-1 if opponents else 1)
    ids = np.argsort(-estimates, kind="stable")[:candidates]
    order = np.lexsort((ids, scores[ids] if opponents else -scores[ids]))[:k]
    return [(int(i), float(scores[i])) for i in ids[order]]


def _found(influences: Any) -> list[tuple[int, float]]:
    assert [item.rank for item in influences] == list(range(influences[0].rank, influences[0].rank + len(influences)))
    return [(item.passage.passage_id, item.score) for item in influences]


def test_every_passage_is_scored_where_that_costs_no_more(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            found = await gateway.trace.Trace(_request(k=7, request_id="mine"))
            assert _found(found.proponents) == _best(7, opponents=False)
            assert _found(found.opponents) == _best(7, opponents=True)
            assert found.request_id == "mine"
            assert (found.target.text, found.target.loss, found.target.model_completion) == (_TEXT, 1.5, "")
            scores = honest.scores_of("alpha", _TEXT)
            for item in (*found.proponents, *found.opponents):
                assert item.z_score == pytest.approx((item.score - scores.mean()) / scores.std(), rel=1e-5)
                assert item.passage == passage(item.passage.passage_id)
                assert not item.HasField("evidence")
            told = found.provenance
            assert (told.generation, told.checkpoint_digest) == ("alpha", honest.CHECKPOINT)
            assert told.config_digest == catalog.describe("alpha").config_digest
            assert (told.exactness, told.candidates_examined, told.passages_total) == (
                common_pb2.EXACTNESS_EXHAUSTIVE,
                NUM,
                NUM,
            )
            assert [stage.stage for stage in told.stages] == ["encode", "rerank", "evidence"]
            assert not told.left_out
            assert gateway.observed.stages == ["encode", "rerank", "evidence"]
            assert gateway.observed.examined == [NUM]
            assert gateway.indexes["alpha"][0].batches == []

    _run(work())


def test_how_far_the_best_proponent_stands_out_is_observed(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            both = await gateway.trace.Trace(_request(k=3))
            assert gateway.observed.z_scores == [pytest.approx(both.proponents[0].z_score)]
            # Another page of the same ranking, opponents alone, and the best of a part of the corpus tell nothing new.
            paged = await gateway.trace.Trace(_request(k=4, page_size=2))
            await gateway.trace.Trace(_request(k=4, page_size=2, page_token=paged.next_page_token))
            await gateway.trace.Trace(_request(k=3, ends=trace_pb2.ENDS_OPPONENTS))
            await gateway.trace.Trace(_request(k=3, filter=common_pb2.Filter(sources=["web"])))
            assert gateway.observed.z_scores == [pytest.approx(both.proponents[0].z_score)] * 2

    _run(work())


@pytest.mark.parametrize(
    ("candidates", "ends", "scans"),
    [(299, 1, False), (300, 1, True), (599, 2, False), (600, 2, True), (599, 3, False)],
)
def test_the_choice_is_that_of_the_library(catalog: Catalog, candidates: int, ends: int, scans: bool) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            found = await gateway.trace.Trace(_request(k=5, candidates=candidates, ends=ends))
            assert (found.provenance.exactness == common_pb2.EXACTNESS_EXHAUSTIVE) is scans

    _run(work())


def test_the_cascade_scores_what_the_coarse_search_proposes(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            found = await gateway.trace.Trace(_request(k=10, candidates=40))
            assert _found(found.proponents) == _of_cascade(10, 40, opponents=False)
            assert _found(found.opponents) == _of_cascade(10, 40, opponents=True)
            assert _found(found.proponents) != _best(10, opponents=False), "the test should tell the two apart"
            assert found.provenance.exactness == common_pb2.EXACTNESS_CASCADE
            assert found.provenance.candidates_examined == 80
            assert [stage.stage for stage in found.provenance.stages] == ["encode", "search", "rerank", "evidence"]
            exact = await gateway.trace.Trace(_request(k=10, candidates=40, exactness=common_pb2.EXACTNESS_EXHAUSTIVE))
            assert _found(exact.proponents) == _best(10, opponents=False)
            wide = await gateway.trace.Trace(_request(k=10, exactness=common_pb2.EXACTNESS_CASCADE))
            assert wide.provenance.exactness == common_pb2.EXACTNESS_CASCADE
            assert _found(wide.opponents) == _best(10, opponents=True)

    _run(work())


@pytest.mark.parametrize("ends", [trace_pb2.ENDS_PROPONENTS, trace_pb2.ENDS_OPPONENTS])
def test_one_end_alone(catalog: Catalog, ends: trace_pb2.Ends.ValueType) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            opponents = ends == trace_pb2.ENDS_OPPONENTS
            found = await gateway.trace.Trace(_request(k=10, candidates=40, ends=ends))
            wanted, other = (found.opponents, found.proponents) if opponents else (found.proponents, found.opponents)
            assert _found(wanted) == _of_cascade(10, 40, opponents=opponents)
            assert not other

    _run(work())


@pytest.mark.parametrize(
    ("chosen", "exactness"),
    [
        (common_pb2.Filter(sources=["news"]), common_pb2.EXACTNESS_CASCADE),
        # 60 passages pass: no more than candidates are asked for.
        (common_pb2.Filter(date_from="2013", date_until="2013"), common_pb2.EXACTNESS_EXHAUSTIVE),
        (
            common_pb2.Filter(
                sources=["web"],
                date_from="2012",
                metadata=[common_pb2.MetadataCondition(field="parity", values=["1"])],
            ),
            common_pb2.EXACTNESS_EXHAUSTIVE,
        ),
        (common_pb2.Filter(sources=["nowhere"]), common_pb2.EXACTNESS_EXHAUSTIVE),
    ],
)
def test_filtered_rankings_are_never_short(
    catalog: Catalog, chosen: common_pb2.Filter, exactness: common_pb2.Exactness.ValueType
) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            request = _request(k=20, candidates=90, filter=chosen)
            found = await gateway.trace.Trace(request)
            matching = sum(passes(i, chosen) for i in range(NUM))
            assert len(found.proponents) == len(found.opponents) == min(20, matching)
            assert found.provenance.exactness == exactness
            for influences, opponents in ((found.proponents, False), (found.opponents, True)):
                assert all(passes(item.passage.passage_id, chosen) for item in influences)
                if exactness == common_pb2.EXACTNESS_EXHAUSTIVE and matching:
                    assert _found(influences) == _best(20, opponents=opponents, chosen=chosen)
            if exactness == common_pb2.EXACTNESS_EXHAUSTIVE:
                assert found.provenance.candidates_examined == matching
            _, streamed = await _streamed(gateway, request)
            del found.provenance.stages[:]
            assert streamed == found

    _run(work())


def test_a_filter_that_leaves_too_few_candidates_scores_all_that_pass(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            chosen = common_pb2.Filter(sources=["news"])
            found = await gateway.trace.Trace(_request(k=80, candidates=80, filter=chosen))
            assert found.provenance.exactness == common_pb2.EXACTNESS_EXHAUSTIVE
            assert _found(found.proponents) == _best(80, opponents=False, chosen=chosen)
            assert len(gateway.reranker.reranked) == 2

    _run(work())


async def _streamed(
    gateway: Gateway, request: trace_pb2.TraceRequest
) -> tuple[list[trace_pb2.TraceStreamResponse], trace_pb2.TraceResponse]:
    """The parts, and the whole answer they amount to, without durations."""
    parts = [part async for part in gateway.trace.TraceStream(trace_pb2.TraceStreamRequest(trace=request))]
    whole = trace_pb2.TraceResponse(request_id=parts[0].encoded.request_id)
    for part in parts:
        whole.proponents.extend(part.evidence.proponents)
        whole.opponents.extend(part.evidence.opponents)
    done = parts[-1].done
    whole.target.CopyFrom(done.target)
    whole.background.CopyFrom(done.background)
    whole.provenance.CopyFrom(done.provenance)
    del whole.provenance.stages[:]
    return parts, whole


@pytest.mark.parametrize("candidates", [30, 200, 1000])
def test_parts_come_in_order_and_amount_to_the_whole(catalog: Catalog, candidates: int) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            evidence = trace_pb2.EvidenceOptions(tokens=True, overlap=True)
            request = _request(k=25, candidates=candidates, evidence=evidence, request_id="one")
            parts, streamed = await _streamed(gateway, request)
            found = await gateway.trace.Trace(request)
            del found.provenance.stages[:]
            assert streamed == found
            kinds = [str(part.WhichOneof("part")) for part in parts]
            assert kinds == sorted(kinds, key=_ORDER.index)
            assert ("coarse" in kinds) is (candidates < 300)
            assert kinds.count("evidence") == 2
            assert kinds.count("reranked") == (3 if candidates == 200 else 1)
            reranked = [part.reranked for part in parts if part.WhichOneof("part") == "reranked"]
            assert [part.final for part in reranked] == [False] * (len(reranked) - 1) + [True]
            assert _found(reranked[-1].proponents) == _found(found.proponents)
            assert _found(reranked[-1].opponents) == _found(found.opponents)
            examined = [part.candidates_examined for part in reranked]
            assert examined == sorted(examined)
            assert examined[-1] == found.provenance.candidates_examined
            for earlier, later in pairwise(reranked):
                assert later.proponents[-1].score >= earlier.proponents[-1].score
                assert later.opponents[-1].score <= earlier.opponents[-1].score
            for part in parts:
                for hit in part.coarse.proponents:
                    assert hit.estimate > 0
                for hit in part.coarse.opponents:
                    assert hit.estimate < 0

    _run(work())


def test_evidence_is_what_was_asked_for(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            wanted = trace_pb2.EvidenceOptions(blocks=True, overlap=True)
            span = trace_pb2.Query(
                prompt="A list:", span=trace_pb2.CompletionSpan(completion="1 2 3 4 5 6", start=4, end=5)
            )
            found = await gateway.trace.Trace(_request(k=60, query=span, evidence=wanted))
            assert found.target.text == "3"
            for item in found.proponents:
                assert not item.evidence.tokens
                assert item.evidence.blocks[0].contribution == 0.25
                # The completion before the span counts as given, what follows it does not.
                assert item.evidence.overlap == float(item.passage.passage_id in (1, 2, 3))

    _run(work())


def test_evidence_without_time_is_left_out_and_said_to_be(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, reranker=HonestReranker(explain_delay=30)) as gateway:
            wanted = trace_pb2.EvidenceOptions(tokens=True)
            found = await gateway.trace.Trace(_request(k=40, evidence=wanted), timeout=1.0)
            assert _found(found.proponents) == _best(40, opponents=False)
            assert not any(item.HasField("evidence") for item in found.proponents)
            assert found.provenance.left_out[0].startswith("evidence of 80 of 80 passages")
            assert len(found.provenance.left_out) == 1

    _run(work())


def test_evidence_is_left_out_when_nobody_can_explain_now(catalog: Catalog) -> None:
    async def work() -> None:
        for error in (NotReady("no replica"), Overloaded("too many")):
            reranker = HonestReranker(fail={"explain": error})
            async with serving(catalog, reranker=reranker) as gateway:
                found = await gateway.trace.Trace(_request(evidence=trace_pb2.EvidenceOptions(overlap=True)))
                assert str(error) in found.provenance.left_out[0]
                assert len(found.proponents) == 10

    _run(work())


def test_pages_put_together_are_the_whole(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            whole = await gateway.trace.Trace(_request(k=25, candidates=50))
            base = _request(k=25, candidates=50, page_size=10)
            encoded = gateway.encoder.calls
            pages = [await gateway.trace.Trace(base)]
            while token := pages[-1].next_page_token:
                base.page_token = token
                pages.append(await gateway.trace.Trace(base))
            assert [len(page.proponents) for page in pages] == [10, 10, 5]
            for end in ("proponents", "opponents"):
                assert [item for page in pages for item in getattr(page, end)] == list(getattr(whole, end))
            assert {page.provenance.generation for page in pages} == {"alpha"}
            assert gateway.encoder.calls == encoded + 1, "later pages come from the ranking that is kept"
        async with serving(catalog) as another:
            # It has never seen the first page.
            base.page_token = pages[0].next_page_token
            again = await another.trace.Trace(base)
            assert list(again.proponents) == list(pages[1].proponents)

    _run(work())


def _ids(answer: trace_pb2.TraceResponse) -> list[int]:
    return [item.passage.passage_id for item in answer.proponents]


def test_what_is_deleted_while_a_call_runs_does_not_end_it(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            asked = _request(k=5, candidates=50)
            whole = _ids(await gateway.trace.Trace(asked))
            gateway.reranker.deleted_after = {whole[0]}
            assert _ids(await gateway.trace.Trace(asked)) == whole
            assert _ids(await gateway.trace.Trace(asked))[:4] == whole[1:]

    _run(work())


def test_what_was_deleted_is_on_no_page(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            asked = _request(k=8, candidates=50, page_size=4)
            whole = _ids(await gateway.trace.Trace(_request(k=10, candidates=50)))
            asked.page_token = (await gateway.trace.Trace(asked)).next_page_token
            gateway.reranker.deleted = {whole[1], whole[5]}
            # The ranking that is kept has it, and does not show it.
            assert _ids(await gateway.trace.Trace(asked)) == [whole[4], whole[6], whole[7]]
            asked.page_token = ""
            first = await gateway.trace.Trace(asked)
            asked.page_token = first.next_page_token
            left = [passage_id for passage_id in whole if passage_id not in gateway.reranker.deleted]
            assert _ids(first) + _ids(await gateway.trace.Trace(asked)) == left

    _run(work())


def test_the_last_page_is_known_to_be_the_last(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            chosen = common_pb2.Filter(date_from="2013", date_until="2013", sources=["web"])  # 20 passages
            base = _request(k=100, page_size=10, filter=chosen)
            first = await gateway.trace.Trace(base)
            base.page_token = first.next_page_token
            second = await gateway.trace.Trace(base)
            assert len(second.proponents) == 10
            assert second.next_page_token == ""

    _run(work())


def test_tokens_fit_their_request_alone(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            token = (await gateway.trace.Trace(_request(k=25, page_size=10))).next_page_token
            for other in (
                _request(k=24, page_size=10, page_token=token),
                _request(k=25, page_size=10, page_token=token, query=trace_pb2.Query(target="Rome")),
                _request(k=25, page_size=10, page_token=token, generation="beta"),
                _request(k=25, page_size=10, page_token=token[:-2]),
                _request(k=25, page_size=10, page_token="!"),
            ):
                error = await _refusal(gateway.trace.Trace(other))
                assert isinstance(error, InvalidRequest)
                assert error.field == "page_token"

    _run(work())


def test_refusals_name_their_field_and_leave_nothing_held(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            for request, field in (
                (_request(k=2000), "k"),
                (trace_pb2.TraceRequest(), "query.target"),
                (_request(query=trace_pb2.Query(target="certain")), "query"),
            ):
                error = await _refusal(gateway.trace.Trace(request))
                assert isinstance(error, InvalidRequest)
                assert error.field == field
            stream = gateway.trace.TraceStream(trace_pb2.TraceStreamRequest(trace=_request(page_size=3)))
            error = await _refusal(stream.read())
            assert isinstance(error, InvalidRequest)
            assert error.field == "trace.page_size"
            assert isinstance(await _refusal(gateway.trace.Trace(_request(generation="gamma"))), NotFound)
            assert gateway.generations._open["alpha"].holders == 0

    _run(work())


def test_an_encoder_of_another_checkpoint_is_refused(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, encoder=HonestEncoder(checkpoint="d" * 64)) as gateway:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await gateway.trace.Trace(_request())
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "dddddd" in str(caught.value.details())
            assert "cccccc" in str(caught.value.details())

    _run(work())


def test_a_caller_asks_only_its_own_generations(catalog: Catalog) -> None:
    async def work() -> None:
        tenant = Principal(name="tenant", generations=("b*",))
        async with serving(catalog, principals={"tenant": tenant}) as gateway:
            metadata = (("caller", "tenant"),)
            for name in ("", "active", "alpha", "there-is-none"):
                error = await _refusal(gateway.trace.Trace(_request(generation=name), metadata=metadata))
                assert isinstance(error, PermissionDenied)
            found = await gateway.trace.Trace(_request(generation="beta", k=5), metadata=metadata)
            assert _found(found.proponents) == _best(5, opponents=False, generation="beta")
            ids = trace_pb2.GetPassagesRequest(passage_ids=[1])
            assert isinstance(await _refusal(gateway.trace.GetPassages(ids, metadata=metadata)), PermissionDenied)

    _run(work())


def test_passages_by_id_and_by_listing(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog) as gateway:
            found = await gateway.trace.GetPassages(trace_pb2.GetPassagesRequest(passage_ids=[5, 3, 5]))
            assert list(found.passages) == [passage(5), passage(3), passage(5)]
            assert (found.generation, found.next_page_token) == ("alpha", "")
            missing = await _refusal(gateway.trace.GetPassages(trace_pb2.GetPassagesRequest(passage_ids=[NUM])))
            assert isinstance(missing, NotFound)
            chosen = common_pb2.Filter(sources=["web"])
            request = trace_pb2.GetPassagesRequest(doc_id="doc-7", filter=chosen, page_size=2)
            listed = []
            while True:
                page = await gateway.trace.GetPassages(request)
                listed += [item.passage_id for item in page.passages]
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
            assert listed == [i for i in range(70, 80) if passes(i, chosen)]
            request.doc_id = "doc-8"
            error = await _refusal(gateway.trace.GetPassages(request))
            assert isinstance(error, InvalidRequest)
            assert error.field == "page_token"

    _run(work())


def test_verify_says_which_passages_there_was_no_time_for(catalog: Catalog) -> None:
    async def work() -> None:
        async with serving(catalog, encoder=HonestEncoder(patched=2)) as gateway:
            found = await gateway.trace.Verify(
                trace_pb2.VerifyRequest(query=trace_pb2.Query(target=_TEXT), passage_ids=[9, 4, 2, 7])
            )
            assert [effect.passage_id for effect in found.effects] == [9, 4]
            assert found.effects[0].probability_after == pytest.approx(0.25 + 12e-6)
            assert found.learning_rate == 1e-3
            assert found.provenance.left_out == ["passages 2, 7: there was no time for them"]
            assert found.provenance.generation == "alpha"
            assert [stage.stage for stage in found.provenance.stages] == ["passages", "verify"]
            assert found.request_id == "made-up"

    _run(work())
