"""Metrics of the replicas, through Ray's metrics so that they leave by each node's own exporter.

Names are those of the gateway's family; Ray's exporter puts `ray_` before them (`ray_trackstar_encode_tokens_total`).
"""

from __future__ import annotations

from ray.util.metrics import Counter, Histogram

from services.encoder.core import BATCH_EXAMPLES, BATCH_SECONDS, BATCH_TOKENS


class RayEncoderObserver:
    """See `services.encoder.core.EncoderObserver`."""

    def __init__(self) -> None:
        self._tokens = Counter("trackstar_encode_tokens_total", "Tokens of queries that were encoded")
        self._batch_examples = Histogram("trackstar_encode_batch_examples", "Queries in a batch", list(BATCH_EXAMPLES))
        self._batch_tokens = Histogram("trackstar_encode_batch_tokens", "Tokens in a batch", list(BATCH_TOKENS))
        self._seconds = Histogram("trackstar_encode_batch_duration_seconds", "Time of a batch", list(BATCH_SECONDS))

    def batch(self, examples: int, tokens: int, seconds: float) -> None:
        """A batch of queries was encoded."""
        if tokens:
            self._tokens.inc(tokens)
        self._batch_examples.observe(examples)
        self._batch_tokens.observe(tokens)
        self._seconds.observe(seconds)


class RayRerankerObserver:
    """See `services.reranker.core.RerankerObserver`."""

    def __init__(self) -> None:
        self._passages = Counter("trackstar_rerank_passages_total", "Passages that were scored exactly")
        self._row_bytes = Counter("trackstar_row_bytes_read_total", "Bytes of rows that were read")

    def scored(self, passages: int, row_bytes: int) -> None:
        """Passages were scored."""
        if passages:
            self._passages.inc(passages)
            self._row_bytes.inc(row_bytes)
