"""From the settings of a method to the method, and to what its answers depend on beside its settings.

Contract: `identity` is cheap, loads no model and changes whenever the answers could; `make` may take its time. Packages
that only one kind of method needs are imported when that kind is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trackstar.errors import InvalidRequest
from trackstar.evaluation.controls import Gold, Random
from trackstar.evaluation.fusion import ReciprocalRank, Weighted, fit_weights
from trackstar.evaluation.method import Method, OnStep, unheard
from trackstar.evaluation.method_settings import (
    DenseSettings,
    FusionSettings,
    GoldSettings,
    InfluenceSettings,
    LexicalSettings,
    MethodSettings,
    RandomSettings,
    TracInSettings,
    TrakSettings,
)
from trackstar.evaluation.selection import Selection, digest_of_asked
from trackstar.evaluation.sentences import Sentences
from trackstar.evaluation.store import Asked, Finished
from trackstar.storage import file_digest

if TYPE_CHECKING:
    from trackstar.evaluation.influence import InfluenceSource
    from trackstar.evaluation.trak import Trak


class MethodMaker:
    """Makes the methods of one evaluation; indexes that several of them score are opened once.

    Args:
        sentences: the corpus.
        selection: the queries.
        k: depth of the rankings.
        on_step: progress.
    """

    def __init__(self, sentences: Sentences, selection: Selection, k: int, on_step: OnStep = unheard) -> None:
        self._sentences = sentences
        self._selection = selection
        self._k = k
        self._on_step = on_step
        self._sources: dict[tuple[str, str | None, str, bool], InfluenceSource] = {}
        self._traks: list[Trak] = []

    def close(self) -> None:
        """Close the indexes."""
        for source in self._sources.values():
            source.close()
        for trak in self._traks:
            trak.close()
        self._sources.clear()
        self._traks.clear()

    def identity(self, settings: MethodSettings, finished: Mapping[str, Finished]) -> dict[str, Any]:
        """What the answers depend on beside settings, corpus, queries and depth.

        Args:
            settings: of the method.
            finished: the methods before it, by name.
        """
        match settings:
            case DenseSettings():
                from trackstar.evaluation.dense import model_folder

                folder = model_folder(settings.model)
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                return {"files": {str(path.relative_to(folder)): file_digest(path) for path in files}}
            case InfluenceSettings():
                return self._identity_of_index(settings)
            case TrakSettings() | TracInSettings():
                return {"indexes": [_identity_of_rows(source) for source in self._checkpoints(settings)]}
            case FusionSettings():
                return {"parts": [finished[name].digest for name in settings.of]}
            case _:
                return {}

    def make(self, settings: MethodSettings, finished: Mapping[str, Finished]) -> tuple[Method, dict[str, Any]]:
        """The method, and what was fitted for it (for the report).

        Raises:
            InvalidRequest, NotFound, Incompatible: it cannot be made as asked.
        """
        texts = self._sentences.texts
        match settings:
            case LexicalSettings():
                from trackstar.evaluation.lexical import Lexical

                words = frozenset(word.casefold() for word in settings.stopwords)
                lexical = Lexical(
                    settings.name, texts, k1=settings.k1, b=settings.b, stopwords=words, on_step=self._on_step
                )
                return lexical, {}
            case DenseSettings():
                from trackstar.evaluation.dense import Dense, model_folder

                folder = model_folder(settings.model)
                dense = Dense(
                    settings.name,
                    texts,
                    folder,
                    device=settings.device,
                    batch=settings.batch,
                    on_step=self._on_step,
                )
                return dense, {}
            case InfluenceSettings():
                return self._influence(settings)
            case TrakSettings():
                return self._trak(settings), {}
            case TracInSettings():
                return self._tracin(settings), {}
            case GoldSettings():
                return Gold(settings.name, _gold_of(self._selection.asked, settings.name)), {}
            case RandomSettings():
                return Random(settings.name, len(texts), seed=settings.seed), {}
            case FusionSettings():
                return self._fusion(settings, finished)

    def _fusion(self, settings: FusionSettings, finished: Mapping[str, Finished]) -> tuple[Method, dict[str, Any]]:
        parts = [finished[name].by_id for name in settings.of]
        if settings.rule == "rank":
            return ReciprocalRank(settings.name, parts, constant=settings.constant), {}
        held_out = self._selection.held_out
        gold = _gold_of(held_out, settings.name)
        weights = fit_weights(parts, held_out.queries, gold, steps=settings.steps, k=self._k)
        return Weighted(settings.name, parts, weights), {"weights": dict(zip(settings.of, weights, strict=True))}

    def _influence(self, settings: InfluenceSettings) -> tuple[Method, dict[str, Any]]:
        from trackstar.evaluation.influence import Influence, fitted_whitening, whitening_of_generation

        source = self._source_of(settings)
        unit_norm = settings.unit_norm
        if settings.mix is None:
            generation = settings.generation or source.index.active()
            whitening = whitening_of_generation(source, generation, unit_norm=unit_norm)
            return Influence(settings.name, source, whitening, on_step=self._on_step), {"generation": generation}
        whitening, weight = fitted_whitening(
            source, settings.mix, self._selection.task.queries, unit_norm=unit_norm, on_step=self._on_step
        )
        fitted = {"lambda": weight} if settings.mix.kind == "task" else {}
        return Influence(settings.name, source, whitening, on_step=self._on_step), fitted

    def _trak(self, settings: TrakSettings) -> Method:
        from trackstar.evaluation.trak import Trak
        from trackstar.evaluation.trak_method import TrakMethod

        trak = Trak(
            settings.indexes,
            damping=settings.damping,
            blockwise=settings.blockwise,
            device=settings.device,
            name=settings.name,
        )
        self._traks.append(trak)
        return TrakMethod(trak, self._sentences, settings.indexes[0], on_step=self._on_step)

    def _tracin(self, settings: TracInSettings) -> Method:
        from trackstar.evaluation.tracin import TracIn

        checkpoints = self._checkpoints(settings)
        weights = settings.weights or (1.0,) * len(checkpoints)
        return TracIn(settings.name, checkpoints, weights, len(self._sentences), on_step=self._on_step)

    def _checkpoints(self, settings: TrakSettings | TracInSettings) -> list[InfluenceSource]:
        trusted = isinstance(settings, TracInSettings) and settings.trust_remote_code
        return [self._source(path, None, settings.device, trusted) for path in settings.indexes]

    def _source_of(self, settings: InfluenceSettings) -> InfluenceSource:
        return self._source(settings.index, settings.model, settings.device, settings.trust_remote_code)

    def _source(self, path: str, model: str | None, device: str, trust_remote_code: bool) -> InfluenceSource:
        from trackstar.evaluation.influence import InfluenceSource

        key = (path, model, device, trust_remote_code)
        if key not in self._sources:
            self._sources[key] = InfluenceSource(
                path, self._sentences, model=model, device=device, trust_remote_code=trust_remote_code
            )
        return self._sources[key]

    def _identity_of_index(self, settings: InfluenceSettings) -> dict[str, Any]:
        source = self._source_of(settings)
        index = source.index
        generation = settings.generation
        if settings.mix is None and generation is None:
            generation = index.active()
        elif generation is not None and generation not in index.generation_names():
            raise InvalidRequest(
                f"the index {settings.index!r} has no finished generation {generation!r}; it has "
                f"{', '.join(index.generation_names()) or 'none'}"
            )
        return {
            **_identity_of_rows(source),
            "generation": generation,
            "task": digest_of_asked(self._selection.task) if settings.needs_task else None,
        }


def _gold_of(asked: Asked, name: str) -> dict[str, tuple[int, ...]]:
    """Gold sentences by query id, for the method of that name."""
    if asked.gold is None:
        raise InvalidRequest(f"the method {name!r} needs gold sentences, and none are known here; leave it out")
    return {query.query_id: gold for query, gold in zip(asked.queries, asked.gold, strict=True)}


def _identity_of_rows(source: InfluenceSource) -> dict[str, Any]:
    from trackstar.tombstones import read_deleted

    root = source.index.root
    return {
        "index": file_digest(root / "index.json"),
        "correction": file_digest(root / "correction.safetensors"),
        "rows": source.rows.digest,
        "deleted": read_deleted(root).digest,
    }
