"""Series that rules and dashboards name and the gateway does not tell of, with the labels that are used of them.

`tests/service/ray_cases.py` looks for Ray's on a cluster that runs; those of GPUs are looked up in its own table.
cAdvisor's name and labels are as Kubernetes documents them (Metrics For Kubernetes System Components).
"""

from __future__ import annotations

_SERVE = ("application", "deployment")

RAY: dict[str, tuple[str, ...]] = {
    "ray_trackstar_encode_tokens_total": (),
    "ray_trackstar_encode_batch_examples_sum": (),
    "ray_trackstar_encode_batch_examples_count": (),
    "ray_trackstar_encode_batch_tokens_sum": (),
    "ray_trackstar_encode_batch_tokens_count": (),
    "ray_trackstar_encode_batch_duration_seconds_bucket": ("le",),
    "ray_trackstar_rerank_passages_total": (),
    "ray_trackstar_row_bytes_read_total": (),
    "ray_serve_deployment_replica_healthy": _SERVE,
    "ray_serve_deployment_queued_queries": _SERVE,
    "ray_serve_replica_processing_queries": _SERVE,
    "ray_serve_deployment_error_counter_total": _SERVE,
    "ray_node_mem_used": (),
    "ray_node_mem_total": (),
}
# Of a job, by `services.reindex.metrics`.
RAY_JOB: dict[str, tuple[str, ...]] = {
    "ray_trackstar_reindex_shards": ("state",),
    "ray_trackstar_reindex_stage": ("state",),
    "ray_trackstar_reindex_tokens_per_second": (),
    "ray_trackstar_reindex_remaining_seconds": (),
    "ray_trackstar_reindex_audit_recall": (),
}
# Where there are GPUs.
RAY_GPU: dict[str, tuple[str, ...]] = {
    "ray_node_gpus_utilization": ("GpuIndex",),
    "ray_node_gram_used": ("GpuIndex",),
    "ray_node_gram_available": ("GpuIndex",),
}
CADVISOR: dict[str, tuple[str, ...]] = {"container_memory_working_set_bytes": ("namespace", "pod", "container")}

ELSEWHERE = {**RAY, **RAY_JOB, **RAY_GPU, **CADVISOR}
# Prometheus' own, and what it gives to every series of a pod's by the chart's monitors.
OF_PROMETHEUS = {"up"}
TARGET_LABELS = {"namespace", "job", "pod"}
