"""A reindex job's gauges, through Ray's metrics so that they leave by the node's own exporter."""

from __future__ import annotations

from ray.util.metrics import Gauge

from trackstar.jobs import PIPELINE_STATES, JobProgress


class RayProgressMetrics:
    """See `services.reindex.progress.ProgressMetrics`. Ray's exporter puts `ray_` before the names."""

    def __init__(self) -> None:
        self._shards = Gauge("trackstar_reindex_shards", "Shards that have come so far", ("state",))
        self._stage = Gauge("trackstar_reindex_stage", "1 for the pipeline's state, 0 for all others", ("state",))
        self._rate = Gauge("trackstar_reindex_tokens_per_second", "Tokens encoded per second in this step")
        self._remaining = Gauge("trackstar_reindex_remaining_seconds", "Time that the step still takes; -1 if unknown")
        self._recall = Gauge("trackstar_reindex_audit_recall", "Recall of the audit; -1 before")

    def show(self, progress: JobProgress) -> None:
        """Set the gauges."""
        for state, count in progress.shards.items():
            self._shards.set(count, {"state": state})
        for state in PIPELINE_STATES:
            self._stage.set(float(state == progress.state), {"state": state})
        self._rate.set(progress.tokens_per_second)
        self._remaining.set(-1.0 if progress.remaining_seconds is None else progress.remaining_seconds)
        self._recall.set(-1.0 if progress.recall is None else progress.recall)
