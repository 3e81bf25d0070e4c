"""A trace as one readable function: encode, search, rerank, evidence; the same answer in parts or as a whole.

    query ─► encode ─► coarse search ─► exact rerank ─► proponents, opponents ─► evidence

Contract: exactly what `trackstar.tracer.Tracer` answers on the same generation. Every passage is scored where that
costs no more than scoring the candidates of each end. With a filter, candidates are proposed without it and the
reranker drops what does not pass; if that leaves a ranking short, or no more passages pass than candidates were asked
for, all passages that pass are scored, and the answer says so as its exactness. So filtered rankings are never short.

Each stage may use its share of the time that is left. Evidence that there is no time for is left out, and said to be.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.backends import EncoderBackend, RerankerBackend
from services.gateway.generations import ServedGeneration
from services.gateway.pages import RecentRankings
from services.gateway.ranking import Place, Rankings, batches, rerank_end
from services.gateway.request import RequestContext
from services.gateway.stages import StageObserver, Stages, Unobserved, provenance
from services.gateway.validate import AskedTrace
from services.vectors import to_array
from trackstar.coarse import check_codes
from trackstar.codes import negate
from trackstar.errors import DeadlineExceeded, Incompatible, InvalidRequest, NotReady, Overloaded
from trackstar.v1 import common_pb2, encoder_pb2, reranker_pb2, trace_pb2

Part = trace_pb2.TraceStreamResponse

# Passages explained at once: enough to fill the model's batches, few enough that some are done when time runs out.
_EXPLAINED_AT_ONCE = 32
_CODE_DTYPES = {"bits": common_pb2.DTYPE_BITS, "prefix": common_pb2.DTYPE_FLOAT32}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Encoded:
    """A query as the encoder read it. `codes`: one for each ranking, negated for opponents."""

    target: trace_pb2.ExplainedTarget
    codes: NDArray[Any]
    dual: common_pb2.Vector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ranked:
    """Both rankings, and what later pages need for their evidence."""

    target: trace_pb2.ExplainedTarget
    dual: common_pb2.Vector
    rankings: Rankings
    exactness: common_pb2.Exactness.ValueType
    final: bool


@dataclass(slots=True, kw_only=True)
class Page:
    """Which passages of each ranking an answer holds: those from `offset` on; `more` says whether others follow."""

    offset: int = 0
    more: bool = False


class Cascade:
    """Answers traces from an encoder, coarse searches and a reranker.

    Args:
        encoder: reads queries.
        reranker: scores and explains.
        observer: hears of every call's stages.
        recent: rankings of which further pages may be asked.
    """

    def __init__(
        self,
        encoder: EncoderBackend,
        reranker: RerankerBackend,
        *,
        observer: StageObserver | None = None,
        recent: RecentRankings[_Ranked] | None = None,
    ) -> None:
        self._encoder = encoder
        self._reranker = reranker
        self._observer = observer or Unobserved()
        self._recent: RecentRankings[_Ranked] = RecentRankings(64) if recent is None else recent

    async def parts(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        context: RequestContext,
        *,
        page: Page | None = None,
        best_so_far: bool = False,
    ) -> AsyncGenerator[Part]:
        """The answer, part by part, in the order that `TraceStreamResponse` names.

        Args:
            asked: what is asked.
            generation: held by the caller until the last part.
            context: gives the time.
            page: which passages come with the evidence parts; the first `asked.page_size` if None.
            best_so_far: rerank in a few batches, and send the best after each with their passages.
        """
        stages, page = Stages(context, self._observer), page or Page()
        known: dict[int, common_pb2.Passage] = {}
        try:
            # A first page is ranked anew, so that it holds nothing that was deleted since.
            ranked = self._recent.get(generation.name, asked.digest) if page.offset else None
            if is_new := ranked is None:
                encoded = await self._encode(asked, generation, stages)
                yield Part(
                    encoded=trace_pb2.EncodedStage(
                        request_id=asked.request_id or context.request_id,
                        generation=generation.name,
                        target=encoded.target,
                    )
                )
                proposed = None
                if not _scores_all(asked, generation.facts.num_passages):
                    hits = await self._search(asked, generation, encoded, stages)
                    yield Part(coarse=_coarse_part(asked, hits))
                    proposed = hits[0]
                async for ranked in self._rerank(asked, generation, encoded, proposed, stages, in_batches=best_so_far):
                    if best_so_far:
                        yield Part(reranked=await self._best_so_far(asked, generation, ranked, known, stages))
                assert ranked is not None, "there is always a final ranking"
                self._observe(asked, ranked.rankings)
                if asked.page_size < asked.k:
                    self._recent.put(generation.name, asked.digest, ranked)
            page.more = not ranked.rankings.ends_at(page.offset + asked.page_size)
            places = ranked.rankings.page(page.offset, asked.page_size)
            if not is_new:
                places = await self._without_deleted(asked, generation, ranked, places, stages)
            left_out: list[str] = []
            async for part in self._explain(asked, generation, ranked, places, known, stages, left_out):
                yield Part(evidence=part)
            yield Part(
                done=trace_pb2.DoneStage(
                    target=ranked.target,
                    background=ranked.rankings.background,
                    provenance=provenance(
                        generation,
                        stages,
                        exactness=ranked.exactness,
                        examined=ranked.rankings.examined,
                        left_out=left_out,
                    ),
                )
            )
        finally:
            for name, seconds in stages.seconds.items():
                self._observer.stage(name, seconds)

    def _observe(self, asked: AskedTrace, rankings: Rankings) -> None:
        self._observer.candidates(rankings.examined)
        # With a filter the best of a part says nothing about the index.
        if asked.filter is None and False in asked.opponents:
            z_score = rankings.best_z_score(asked.opponents.index(False))
            if z_score is not None:
                self._observer.best_z_score(z_score)

    async def _encode(self, asked: AskedTrace, generation: ServedGeneration, stages: Stages) -> _Encoded:
        request = encoder_pb2.EncodeRequest(generation=generation.name, query=asked.query, complete=asked.complete)
        try:
            found = await stages.run(
                "encode",
                "encoding the query",
                lambda seconds: self._encoder.encode(request, timeout_seconds=seconds),
            )
        except InvalidRequest as error:
            raise InvalidRequest(str(error), field=error.field or "query") from error
        facts = generation.facts
        if found.checkpoint_digest != facts.checkpoint_digest:
            raise Incompatible(
                f"the encoder runs checkpoint {found.checkpoint_digest[:12]!r}, generation {facts.name!r} is of "
                f"{facts.checkpoint_digest[:12]!r}; deploy the checkpoint the index was built with"
            )
        spec = generation.spec
        try:
            code = to_array(found.code, _CODE_DTYPES[spec.kind], dim=spec.size, name="code")
            check_codes(spec.kind, spec.size, code)
            to_array(found.dual, common_pb2.DTYPE_FLOAT32, dim=facts.dim, name="dual")
        except InvalidRequest as error:
            raise Incompatible(f"the encoder's answer does not fit generation {facts.name!r}: {error}") from error
        return _Encoded(
            target=found.target,
            codes=np.concatenate([negate(spec, code) if opponents else code for opponents in asked.opponents]),
            dual=found.dual,
        )

    async def _search(
        self, asked: AskedTrace, generation: ServedGeneration, encoded: _Encoded, stages: Stages
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Candidates and estimated cosines of each ranking, [ends, L]."""
        limit = min(asked.candidates, generation.facts.num_passages)
        return await stages.run(
            "search",
            "the coarse search",
            lambda seconds: generation.search.search(encoded.codes, limit, timeout_seconds=seconds),
        )

    async def _rerank(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        encoded: _Encoded,
        proposed: NDArray[np.int64] | None,
        stages: Stages,
        *,
        in_batches: bool,
    ) -> AsyncIterator[_Ranked]:
        """The rankings so far, of which the last is final; every passage is scored if none are proposed."""

        async def score(ends: Sequence[reranker_pb2.RerankEnd]) -> reranker_pb2.RerankResponse:
            request = reranker_pb2.RerankRequest(
                generation=generation.name, dual=encoded.dual, ends=ends, k=asked.k, filter=asked.filter
            )
            return await stages.run(
                "rerank",
                "scoring the passages",
                lambda seconds: self._reranker.rerank(request, timeout_seconds=seconds),
            )

        def ranked(rankings: Rankings, exactness: common_pb2.Exactness.ValueType, final: bool) -> _Ranked:
            return _Ranked(
                target=encoded.target, dual=encoded.dual, rankings=rankings, exactness=exactness, final=final
            )

        ends = range(len(asked.opponents))
        rankings = Rankings.empty(len(ends))
        if proposed is not None:
            candidates = batches(proposed) if in_batches else [list(proposed)]
            for number, batch in enumerate(candidates, start=1):
                which = [end for end in ends if len(batch[end])]
                response = await score([rerank_end(batch[end], opponents=asked.opponents[end]) for end in which])
                rankings = rankings.merged(response, which, asked.opponents, k=asked.k)
                is_last = number == len(candidates)
                needs_all = asked.filter is not None and (
                    rankings.matching <= asked.candidates or (is_last and rankings.is_short(asked.k))
                )
                yield ranked(rankings, common_pb2.EXACTNESS_CASCADE, final=is_last and not needs_all)
                if needs_all:
                    break
            else:
                return
        response = await score([reranker_pb2.RerankEnd(opponents=opponents) for opponents in asked.opponents])
        rankings = Rankings.empty(len(ends)).merged(response, ends, asked.opponents, k=asked.k)
        yield ranked(rankings, common_pb2.EXACTNESS_EXHAUSTIVE, final=True)

    async def _best_so_far(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        ranked: _Ranked,
        known: dict[int, common_pb2.Passage],
        stages: Stages,
    ) -> trace_pb2.RerankedStage:
        rankings = ranked.rankings
        places = rankings.page(0, asked.k)
        await self._read(generation, ranked, [place.passage_id for place in places], known, stages)
        part = trace_pb2.RerankedStage(
            background=rankings.background, candidates_examined=rankings.examined, final=ranked.final
        )
        for place in places:
            _end_of(part, asked, place).append(place.influence(known, rankings.background, {}))
        return part

    async def _explain(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        ranked: _Ranked,
        places: Sequence[Place],
        known: dict[int, common_pb2.Passage],
        stages: Stages,
        left_out: list[str],
    ) -> AsyncIterator[trace_pb2.EvidenceStage]:
        """The page's passages with their evidence; what there is no evidence of is added to `left_out`."""
        wanted = asked.evidence.tokens or asked.evidence.blocks or asked.evidence.overlap
        size = _EXPLAINED_AT_ONCE if wanted else max(1, len(places))
        for start in range(0, max(1, len(places)), size):
            chunk = places[start : start + size]
            ids = list(dict.fromkeys(place.passage_id for place in chunk))
            evidence: dict[int, common_pb2.Evidence] = {}
            if wanted and ids and not left_out:
                try:
                    evidence = await self._evidence(asked, generation, ranked, ids, known, stages)
                except (DeadlineExceeded, NotReady, Overloaded) as error:
                    left_out.append(f"evidence of {len(places) - start} of {len(places)} passages: {error}")
            await self._read(generation, ranked, ids, known, stages)
            part = trace_pb2.EvidenceStage()
            for place in chunk:
                _end_of(part, asked, place).append(place.influence(known, ranked.rankings.background, evidence))
            yield part

    async def _evidence(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        ranked: _Ranked,
        ids: Sequence[int],
        known: dict[int, common_pb2.Passage],
        stages: Stages,
    ) -> dict[int, common_pb2.Evidence]:
        request = reranker_pb2.ExplainRequest(
            generation=generation.name,
            dual=ranked.dual,
            passage_ids=ids,
            query_text=_query_text(asked.query, ranked.target.text),
            tokens=asked.evidence.tokens,
            blocks=asked.evidence.blocks,
            overlap=asked.evidence.overlap,
        )
        response = await stages.run(
            "evidence",
            "explaining the passages",
            lambda seconds: self._reranker.explain(request, timeout_seconds=seconds),
        )
        found = {item.passage.passage_id: item for item in response.passages}
        known.update({passage_id: item.passage for passage_id, item in found.items()})
        return {passage_id: item.evidence for passage_id, item in found.items()}

    async def _without_deleted(
        self,
        asked: AskedTrace,
        generation: ServedGeneration,
        ranked: _Ranked,
        places: Sequence[Place],
        stages: Stages,
    ) -> list[Place]:
        """Places of a ranking made earlier whose passages may still be shown; a page is then shorter than others."""
        ids = [[place.passage_id for place in places if place.end == end] for end in range(len(asked.opponents))]
        which = [end for end, found in enumerate(ids) if found]
        if not which:
            return []
        request = reranker_pb2.RerankRequest(
            generation=generation.name,
            dual=ranked.dual,
            ends=[rerank_end(np.array(ids[end], dtype=np.int64), opponents=asked.opponents[end]) for end in which],
            k=asked.page_size,
        )
        response = await stages.run(
            "rerank",
            "scoring the passages",
            lambda seconds: self._reranker.rerank(request, timeout_seconds=seconds),
        )
        left = Rankings.empty(len(ids)).merged(response, which, asked.opponents, k=asked.page_size)
        kept = {(end, passage_id) for end, found in enumerate(left.ids) for passage_id in found.tolist()}
        return [place for place in places if (place.end, place.passage_id) in kept]

    async def _read(
        self,
        generation: ServedGeneration,
        ranked: _Ranked,
        ids: Sequence[int],
        known: dict[int, common_pb2.Passage],
        stages: Stages,
    ) -> None:
        """Read passages that are not known yet."""
        missing = [passage_id for passage_id in dict.fromkeys(ids) if passage_id not in known]
        if missing:
            # Reading by id would refuse what was deleted since it was ranked, and with it the whole call.
            request = reranker_pb2.ExplainRequest(generation=generation.name, dual=ranked.dual, passage_ids=missing)
            response = await stages.run(
                "evidence",
                "reading the passages",
                lambda seconds: self._reranker.explain(request, timeout_seconds=seconds),
                budget="passages",
            )
            known.update({item.passage.passage_id: item.passage for item in response.passages})


def _scores_all(asked: AskedTrace, num_passages: int) -> bool:
    """Whether every passage is scored: asked for, or no dearer than the candidates of each end."""
    if asked.exactness == common_pb2.EXACTNESS_UNSPECIFIED:
        return len(asked.opponents) * min(asked.candidates, num_passages) >= num_passages
    return asked.exactness == common_pb2.EXACTNESS_EXHAUSTIVE


def _coarse_part(asked: AskedTrace, hits: tuple[NDArray[np.int64], NDArray[np.float32]]) -> trace_pb2.CoarseStage:
    """The best k candidates of each end; estimates are of the query itself, so those of opponents change sign."""
    part = trace_pb2.CoarseStage()
    for opponents, ids, cosines in zip(asked.opponents, *hits, strict=True):
        sign = -1.0 if opponents else 1.0
        (part.opponents if opponents else part.proponents).extend(
            trace_pb2.CoarseHit(passage_id=passage_id, estimate=sign * cosine)
            for passage_id, cosine in zip(ids[: asked.k].tolist(), cosines[: asked.k].tolist(), strict=True)
        )
    return part


def _end_of(
    part: trace_pb2.RerankedStage | trace_pb2.EvidenceStage, asked: AskedTrace, place: Place
) -> MutableSequence[common_pb2.Influence]:
    return part.opponents if asked.opponents[place.end] else part.proponents


def _query_text(query: trace_pb2.Query, target: str) -> str:
    """All words of a query: what was given, and what is explained."""
    given = query.span.completion[: query.span.start] if query.WhichOneof("explained") == "span" else ""
    return f"{query.prompt} {given} {target}" if given else f"{query.prompt} {target}"
