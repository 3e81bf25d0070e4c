"""Encoder and reranker cores against the library's tracer, without any network between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.encoder.core import EncoderCore
from services.encoder.model import LocalModel, ModelWorker
from services.reranker.core import RerankerCore
from services.vectors import to_array, to_vector
from tests.service import demo_index
from trackstar.errors import DeadlineExceeded, InvalidRequest, NotFound, Overloaded
from trackstar.index import Index
from trackstar.results import Query
from trackstar.retirement import collect, retire
from trackstar.tracer import Tracer
from trackstar.v1 import common_pb2, encoder_pb2, reranker_pb2, trace_pb2


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_index.build(tmp_path_factory.mktemp("cores"))


@pytest.fixture(scope="module")
def tracer(index: Path) -> Iterator[Tracer]:
    tracer = Tracer.open(str(index))
    yield tracer
    tracer.close()


class Cores:
    """Both cores on one index."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.set_num_threads(1)
        opened = Index(folder)
        loaded = opened.load_model()
        model = LocalModel(ModelWorker(opened, loaded))
        self.encoder = EncoderCore(opened, loaded.tokenizer, loaded.max_tokens, model, **options)
        self.reranker = RerankerCore(opened, self.encoder)
        self.generation = opened.active()

    async def encode(self, query: trace_pb2.Query, *, complete: bool = False) -> encoder_pb2.EncodeResponse:
        request = encoder_pb2.EncodeRequest(generation=self.generation, query=query, complete=complete)
        return await self.encoder.encode(request, timeout_seconds=30)

    async def close(self) -> None:
        await self.reranker.close()
        await self.encoder.close()


def run(folder: Path, main: Callable[[Cores], Any], **options: Any) -> None:
    async def started() -> None:
        cores = Cores(folder, **options)
        try:
            await main(cores)
        finally:
            await cores.close()

    asyncio.run(started())


def asked(number: int) -> tuple[trace_pb2.Query, Query]:
    prompt, target = demo_index.QUERIES[number]
    return trace_pb2.Query(prompt=prompt, target=target), Query(query_id="q", prompt=prompt, target=target)


def ids_and_scores(end: reranker_pb2.RankedEnd) -> tuple[list[int], list[float]]:
    ids = to_array(end.ids, common_pb2.DTYPE_INT64, dim=None, name="ids")
    scores = to_array(end.scores, common_pb2.DTYPE_FLOAT32, dim=None, name="scores")
    return ids.ravel().tolist(), scores.ravel().tolist()


def test_the_parts_together_give_the_tracers_answer(index: Path, tracer: Tracer) -> None:
    async def main(cores: Cores) -> None:
        for number in range(len(demo_index.QUERIES)):
            message, query = asked(number)
            expected = tracer.trace(query, k=6, exact=True)
            encoded = await cores.encode(message)
            assert encoded.target.loss == pytest.approx(expected.loss)
            assert encoded.target.text == query.target
            ranked = await cores.reranker.rerank(
                reranker_pb2.RerankRequest(
                    generation=cores.generation,
                    dual=encoded.dual,
                    ends=[reranker_pb2.RerankEnd(), reranker_pb2.RerankEnd(opponents=True)],
                    k=6,
                ),
                timeout_seconds=30,
            )
            assert ranked.examined == ranked.matching == demo_index.NUM_PASSAGES
            assert ranked.background.mean == pytest.approx(expected.background_mean)
            assert ranked.background.std == pytest.approx(expected.background_std)
            for end, influences in zip(ranked.ends, (expected.proponents, expected.opponents), strict=True):
                ids, scores = ids_and_scores(end)
                assert ids == [item.passage.passage_id for item in influences]
                assert scores == pytest.approx([item.score for item in influences], abs=1e-6)
                explained = await cores.reranker.explain(
                    reranker_pb2.ExplainRequest(
                        generation=cores.generation,
                        dual=encoded.dual,
                        passage_ids=ids,
                        query_text=f"{query.prompt} {query.target}",
                        tokens=True,
                        blocks=True,
                        overlap=True,
                    ),
                    timeout_seconds=30,
                )
                for found, item in zip(explained.passages, influences, strict=True):
                    assert item.evidence is not None
                    assert found.passage.text == item.passage.text
                    assert dict(found.passage.metadata) == item.passage.metadata
                    assert found.evidence.overlap == item.evidence.overlap
                    assert [share.text for share in found.evidence.tokens] == [text for text, _ in item.evidence.tokens]
                    assert [share.contribution for share in found.evidence.tokens] == pytest.approx(
                        [share for _, share in item.evidence.tokens], abs=1e-7
                    )
                    assert [share.contribution for share in found.evidence.blocks] == pytest.approx(
                        [share for _, share in item.evidence.blocks], abs=1e-7
                    )

    run(index, main)


def test_queries_of_different_lengths_at_once_are_answered_as_alone(index: Path) -> None:
    async def main(cores: Cores) -> None:
        messages = [asked(number % len(demo_index.QUERIES))[0] for number in range(20)]
        alone = [await cores.encode(message) for message in messages[: len(demo_index.QUERIES)]]
        together = await asyncio.gather(*(cores.encode(message) for message in messages))
        for number, found in enumerate(together):
            assert found == alone[number % len(demo_index.QUERIES)]

    run(index, main)


def test_candidates_filters_and_blocks_alone(index: Path) -> None:
    async def main(cores: Cores) -> None:
        encoded = await cores.encode(asked(0)[0])
        candidates = np.arange(0, 60, dtype=np.int64)
        request = reranker_pb2.RerankRequest(
            generation=cores.generation,
            dual=encoded.dual,
            ends=[reranker_pb2.RerankEnd(candidates=to_vector(candidates))],
            k=60,
            filter=common_pb2.Filter(
                sources=["web"],
                metadata=[common_pb2.MetadataCondition(field="language", values=["en"])],
                date_from="2012",
                date_until="2015",
            ),
        )
        ranked = await cores.reranker.rerank(request, timeout_seconds=30)
        passes = [
            number
            for number in range(demo_index.NUM_PASSAGES)
            if number % 3 == 1 and number % 4 and 2 <= number % 10 <= 5
        ]
        assert sorted(ids_and_scores(ranked.ends[0])[0]) == [number for number in passes if number < 60]
        assert ranked.matching == len(passes)
        request.ends[0].ClearField("candidates")
        everything = await cores.reranker.rerank(request, timeout_seconds=30)
        assert sorted(ids_and_scores(everything.ends[0])[0]) == passes
        explained = await cores.reranker.explain(
            reranker_pb2.ExplainRequest(
                generation=cores.generation, dual=encoded.dual, passage_ids=passes, blocks=True
            ),
            timeout_seconds=30,
        )
        by_id = dict(zip(*ids_and_scores(everything.ends[0]), strict=True))
        for item in explained.passages:
            assert not item.evidence.tokens
            assert not item.evidence.HasField("overlap")
            total = sum(share.contribution for share in item.evidence.blocks)
            assert total == pytest.approx(by_id[item.passage.passage_id], abs=1e-5)

    run(index, main)


def test_passages_by_id_by_document_and_page_by_page(index: Path) -> None:
    async def main(cores: Cores) -> None:
        async def read(**fields: Any) -> reranker_pb2.ReadPassagesResponse:
            request = reranker_pb2.ReadPassagesRequest(generation=cores.generation, **fields)
            return await cores.reranker.read_passages(request, timeout_seconds=30)

        found = await read(passage_ids=[7, 3], tokens=True)
        assert [item.passage.passage_id for item in found.passages] == [7, 3]
        assert all(item.tokens for item in found.passages)
        document = await read(doc_id="doc-5", limit=10)
        assert [item.passage.passage_id for item in document.passages] == [10, 11]
        assert document.next_id == -1
        first = await read(filter=common_pb2.Filter(sources=["news"]), limit=4)
        assert [item.passage.passage_id for item in first.passages] == [2, 5, 8, 11]
        assert first.next_id == 14
        following = await read(filter=common_pb2.Filter(sources=["news"]), limit=4, first_id=first.next_id)
        assert following.passages[0].passage.passage_id == 14
        with pytest.raises(NotFound):
            await read(passage_ids=[5, demo_index.NUM_PASSAGES])

    run(index, main)


def test_spans_and_the_models_own_words(index: Path, tracer: Tracer) -> None:
    async def main(cores: Cores) -> None:
        own = await cores.encode(trace_pb2.Query(prompt="the cat", own=trace_pb2.OwnCompletion(max_new_tokens=5)))
        assert own.target.text == own.target.model_completion == tracer.predict("the cat", max_new_tokens=5)
        whole = await cores.encode(asked(0)[0], complete=True)
        assert whole.target.model_completion == tracer.predict(asked(0)[1].prompt)
        span = trace_pb2.CompletionSpan(completion="a mat and more", start=0, end=5)
        spanned = await cores.encode(trace_pb2.Query(prompt="the cat sat on", span=span))
        assert spanned.target.text.strip() == "a mat"
        assert spanned.target.loss == pytest.approx(whole.target.loss)
        assert spanned.dual == whole.dual

    run(index, main)


def test_steps_are_tried_on_a_copy(index: Path) -> None:
    async def main(cores: Cores) -> None:
        before = await cores.encode(asked(0)[0])
        request = encoder_pb2.TailPatchRequest(
            generation=cores.generation,
            query=asked(0)[0],
            passages=[encoder_pb2.TokenSequence(passage_id=4, tokens=[0, 5, 9, 11, 20])],
            optimizer=trace_pb2.PATCH_OPTIMIZER_SGD,
            learning_rate=0.05,
        )
        first = await cores.encoder.tail_patch(request, timeout_seconds=30)
        again = await cores.encoder.tail_patch(request, timeout_seconds=30)
        assert first == again
        (effect,) = first.effects
        assert effect.passage_id == 4
        assert effect.loss_before == pytest.approx(before.target.loss, rel=1e-5)
        assert effect.loss_after != effect.loss_before
        assert (await cores.encode(asked(0)[0])) == before

    run(index, main)


def test_what_cannot_be_done_says_so(index: Path) -> None:
    async def main(cores: Cores) -> None:
        with pytest.raises(InvalidRequest, match="target"):
            await cores.encode(trace_pb2.Query(prompt="a", target="  "))
        with pytest.raises(NotFound):
            await cores.encoder.encode(
                encoder_pb2.EncodeRequest(generation="none", query=asked(0)[0]), timeout_seconds=5
            )
        encoded = await cores.encode(asked(0)[0])
        with pytest.raises(DeadlineExceeded):
            await cores.encoder.encode(
                encoder_pb2.EncodeRequest(generation=cores.generation, query=asked(0)[0]), timeout_seconds=1e-6
            )
        wrong = common_pb2.Vector(data=encoded.dual.data[:-4], dtype=common_pb2.DTYPE_FLOAT32, dim=encoded.dual.dim)
        with pytest.raises(InvalidRequest, match="dual"):
            await cores.reranker.rerank(
                reranker_pb2.RerankRequest(generation=cores.generation, dual=wrong, ends=[reranker_pb2.RerankEnd()]),
                timeout_seconds=5,
            )

    run(index, main)


def test_too_many_waiting_tokens_are_refused(index: Path) -> None:
    async def main(cores: Cores) -> None:
        results = await asyncio.gather(
            *(cores.encode(asked(number % 5)[0]) for number in range(60)), return_exceptions=True
        )
        assert any(isinstance(result, Overloaded) for result in results)
        assert any(isinstance(result, encoder_pb2.EncodeResponse) for result in results)
        assert all(isinstance(result, Overloaded | encoder_pb2.EncodeResponse) for result in results)

    run(index, main, max_waiting_tokens=100)


def test_a_generation_that_is_asked_for_is_opened_although_it_was_retired(tmp_path: Path) -> None:
    folder = demo_index.build(tmp_path)
    other = demo_index.other_generation(folder)

    async def main(cores: Cores) -> None:
        retire(Index(folder).catalog, other)
        cores.generation = other
        encoded = await cores.encode(asked(0)[0])
        ranked = await cores.reranker.rerank(
            reranker_pb2.RerankRequest(generation=other, dual=encoded.dual, ends=[reranker_pb2.RerankEnd()], k=3),
            timeout_seconds=30,
        )
        assert len(ids_and_scores(ranked.ends[0])[0]) == 3
        collect(Index(folder).catalog)

    run(folder, main)
    with pytest.raises(NotFound, match="has no generation"):
        Index(folder).generation(other, retired=True)
