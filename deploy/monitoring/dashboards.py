"""Grafana's dashboards, made as JSON: what the service does, and what it does it with.

    python -m deploy.monitoring.dashboards      # writes charts/trackstar/dashboards/*.json

Contract: a test makes them again and compares, and runs every expression against a Prometheus that scrapes a service.
Only the labels that the chart's own monitors give are used: namespace, job, pod. A gateway's label `service` is named
`exported_service` there, because the target has one of its own; nothing here needs it.
"""

from __future__ import annotations

import json
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.monitoring.panels import Query, dashboard, gateway, lines, mean, number, quantiles, rate, ray

FOLDER = Path(__file__).parents[2] / "charts" / "trackstar" / "dashboards"

_TRACES = 'method=~"Trace|TraceStream"'


def calls() -> Dashboard:
    """Rate, errors and duration; what is turned away; backends that fail."""
    return dashboard(
        "calls",
        "Calls",
        [
            (
                "Objectives",
                [
                    lines(
                        "Calls that failed by our fault",
                        "percentunit",
                        [
                            Query(gateway(f"namespace_job:trackstar_errors:ratio_rate{window}"), f"over {window}")
                            for window in ("5m", "1h", "6h", "3d")
                        ],
                        about="As the rules record it; docs/monitoring.md says which codes count.",
                        width=12,
                    ),
                    lines(
                        "Traces slower than the objective",
                        "percentunit",
                        [
                            Query(gateway(f"namespace_job:trackstar_slow_traces:ratio_rate{window}"), f"over {window}")
                            for window in ("5m", "1h", "6h", "3d")
                        ],
                        about="As the rules record it.",
                        width=12,
                    ),
                ],
            ),
            (
                "Rate, errors, duration",
                [
                    lines(
                        "Calls",
                        "reqps",
                        [Query(rate(gateway("trackstar_rpc_handled_total"), "method"), "{{method}}")],
                    ),
                    lines(
                        "Calls that did not end well, by code",
                        "reqps",
                        [Query(rate(gateway("trackstar_rpc_handled_total", 'code!="OK"'), "code"), "{{code}}")],
                        about="All codes but OK, whosoever's fault.",
                    ),
                    lines(
                        "Time of a trace",
                        "s",
                        quantiles(gateway, "trackstar_rpc_duration_seconds", _TRACES),
                        about="From a call's arrival to its end, waiting included.",
                    ),
                ],
            ),
            (
                "Load",
                [
                    lines(
                        "Calls that run or wait",
                        "short",
                        [Query(f"sum by (pod) ({gateway('trackstar_rpc_in_flight')})", "{{pod}}")],
                    ),
                    lines(
                        "Calls that wait for a place",
                        "short",
                        [Query(f"sum by (pod) ({gateway('trackstar_admission_queue_length')})", "{{pod}}")],
                    ),
                    lines(
                        "Time that admitted calls waited", "s", quantiles(gateway, "trackstar_admission_wait_seconds")
                    ),
                ],
            ),
            (
                "Turned away, and backends",
                [
                    lines(
                        "Calls turned away before they began",
                        "reqps",
                        [Query(rate(gateway("trackstar_rejected_total"), "reason"), "{{reason}}")],
                        width=6,
                    ),
                    lines(
                        "Calls to backends that were tried again",
                        "reqps",
                        [Query(rate(gateway("trackstar_backend_retries_total"), "backend"), "{{backend}}")],
                        width=6,
                    ),
                    lines(
                        "Circuit breakers",
                        "short",
                        [Query(f"max by (backend) ({gateway('trackstar_breaker_state')})", "{{backend}}")],
                        about="0 closed, 1 half open, 2 open: the worst of all gateways.",
                        width=6,
                    ),
                    lines(
                        "Defects",
                        "short",
                        [Query(f"sum(increase({gateway('trackstar_defects_total')}[1h]))", "in an hour")],
                        about="Errors that nobody raised on purpose; each has a traceback in the log.",
                        width=6,
                    ),
                ],
            ),
        ],
    )


def stages() -> Dashboard:
    """Where the time of a trace goes, and how the corpus narrows to an answer."""
    return dashboard(
        "stages",
        "Stages",
        [
            (
                "Time",
                [
                    lines(
                        "Median time of a stage",
                        "s",
                        [Query(_stage(0.5), "{{stage}}")],
                        about="encode, search, rerank, evidence; passages and verify are calls of their own.",
                    ),
                    lines(
                        "99th percentile of a stage",
                        "s",
                        [Query(_stage(0.99), "{{stage}}")],
                    ),
                    lines(
                        "Seconds spent in each stage, per second",
                        "short",
                        [Query(rate(gateway("trackstar_stage_duration_seconds_sum"), "stage"), "{{stage}}")],
                        about="How many calls are in a stage at once, on average.",
                    ),
                ],
            ),
            (
                "From candidates to evidence",
                [
                    lines(
                        "Calls that reach a stage",
                        "reqps",
                        [Query(rate(gateway("trackstar_stage_duration_seconds_count"), "stage"), "{{stage}}")],
                        about="Where there are fewer searches than encodings, the rest scored every passage.",
                    ),
                    lines(
                        "Passages scored exactly for a trace",
                        "short",
                        [
                            *quantiles(gateway, "trackstar_candidates"),
                            Query(mean(gateway, "trackstar_candidates"), "mean"),
                        ],
                    ),
                    lines(
                        "Bytes of rows read",
                        "Bps",
                        [
                            Query(rate(gateway("trackstar_row_bytes_read_total")), "by the gateway's process"),
                            Query(rate(ray("ray_trackstar_row_bytes_read_total")), "by rerankers on Ray"),
                        ],
                    ),
                ],
            ),
        ],
    )


def encoders() -> Dashboard:
    """Encoders and rerankers on Ray Serve, and the GPUs below them."""
    return dashboard(
        "encoders",
        "Encoders and GPUs",
        [
            (
                "Encoders",
                [
                    lines(
                        "Tokens of queries encoded",
                        "short",
                        [
                            Query(rate(ray("ray_trackstar_encode_tokens_total")), "per second, on Ray"),
                            Query(rate(gateway("trackstar_encode_tokens_total")), "per second, in one process"),
                        ],
                    ),
                    lines(
                        "Queries in a batch",
                        "short",
                        [
                            Query(mean(ray, "ray_trackstar_encode_batch_examples"), "mean, on Ray"),
                            Query(mean(gateway, "trackstar_encode_batch_examples"), "mean, in one process"),
                        ],
                        about="1 while the model has time for every query by itself.",
                    ),
                    lines(
                        "Tokens in a batch",
                        "short",
                        [
                            Query(mean(ray, "ray_trackstar_encode_batch_tokens"), "mean, on Ray"),
                            Query(mean(gateway, "trackstar_encode_batch_tokens"), "mean, in one process"),
                        ],
                    ),
                    lines(
                        "Time of a batch",
                        "s",
                        [
                            *quantiles(ray, "ray_trackstar_encode_batch_duration_seconds"),
                            Query(mean(gateway, "trackstar_encode_batch_duration_seconds"), "mean, in one process"),
                        ],
                        about="Quantiles are those on Ray.",
                        width=12,
                    ),
                    lines(
                        "Passages scored exactly by rerankers",
                        "short",
                        [Query(rate(ray("ray_trackstar_rerank_passages_total")), "per second")],
                        width=12,
                    ),
                ],
            ),
            (
                "Replicas",
                [
                    lines(
                        "Healthy replicas",
                        "short",
                        [
                            Query(
                                f"sum by (application, deployment) ({ray('ray_serve_deployment_replica_healthy')})",
                                "{{application}} {{deployment}}",
                            )
                        ],
                        width=6,
                    ),
                    lines(
                        "Calls waiting for a replica",
                        "short",
                        [
                            Query(
                                f"sum by (application, deployment) ({ray('ray_serve_deployment_queued_queries')})",
                                "{{application}} {{deployment}}",
                            )
                        ],
                        width=6,
                    ),
                    lines(
                        "Calls in replicas",
                        "short",
                        [
                            Query(
                                f"sum by (application, deployment) ({ray('ray_serve_replica_processing_queries')})",
                                "{{application}} {{deployment}}",
                            )
                        ],
                        about="Scaling aims at target_ongoing_requests of them for each replica.",
                        width=6,
                    ),
                    lines(
                        "Calls that failed in replicas",
                        "reqps",
                        [
                            Query(
                                rate(ray("ray_serve_deployment_error_counter_total"), "application", "deployment"),
                                "{{application}} {{deployment}}",
                            )
                        ],
                        width=6,
                    ),
                ],
            ),
            (
                "GPUs and nodes",
                [
                    lines(
                        "GPU utilisation",
                        "percent",
                        [Query(ray("ray_node_gpus_utilization"), "{{pod}} {{GpuIndex}}")],
                    ),
                    lines(
                        "GPU memory used",
                        "percentunit",
                        [
                            Query(
                                f"{ray('ray_node_gram_used')} / "
                                f"({ray('ray_node_gram_used')} + {ray('ray_node_gram_available')})",
                                "{{pod}} {{GpuIndex}}",
                            )
                        ],
                    ),
                    lines(
                        "Memory used",
                        "percentunit",
                        [
                            Query(
                                f"{ray('ray_node_mem_used')} / {ray('ray_node_mem_total')}",
                                "{{pod}}",
                            )
                        ],
                        about="Of the pod, as Ray measures it; it kills workers at 95 %.",
                    ),
                ],
            ),
        ],
    )


def jobs() -> Dashboard:
    """Jobs that build another generation."""
    return dashboard(
        "jobs",
        "Reindex jobs",
        [
            (
                "Jobs of the gateway",
                [
                    lines(
                        "Jobs",
                        "short",
                        [Query(f"max by (state) ({gateway('trackstar_reindex_jobs')})", "{{state}}")],
                        about="Every gateway over an index tells the same.",
                        width=12,
                    ),
                    lines(
                        "Shards of the jobs that run",
                        "short",
                        [Query(f"max by (state) ({gateway('trackstar_reindex_shards')})", "{{state}}")],
                        about="Those encoded, coded and imported rise one after the other to those planned.",
                        width=12,
                    ),
                    lines(
                        "Tokens encoded per second",
                        "short",
                        [Query(f"max({gateway('trackstar_reindex_tokens_per_second')})", "jobs that run")],
                        width=12,
                    ),
                    lines(
                        "Time left",
                        "s",
                        [Query(f"max({gateway('trackstar_reindex_remaining_seconds')})", "all jobs that run")],
                        about="Nothing while it cannot be told.",
                        width=12,
                    ),
                ],
            ),
            (
                "On Ray, a RayJob among them",
                [
                    lines(
                        "Shards",
                        "short",
                        [Query(f"max by (state) ({ray('ray_trackstar_reindex_shards')})", "{{state}}")],
                    ),
                    lines(
                        "State of the pipeline",
                        "short",
                        [Query(f"max by (state) ({ray('ray_trackstar_reindex_stage')}) == 1", "{{state}}")],
                    ),
                    lines(
                        "Tokens encoded per second",
                        "short",
                        [Query(f"sum({ray('ray_trackstar_reindex_tokens_per_second')})", "in this step")],
                    ),
                    lines(
                        "Time left in this step",
                        "s",
                        [Query(f"max({ray('ray_trackstar_reindex_remaining_seconds')}) >= 0", "seconds")],
                        width=12,
                    ),
                    lines(
                        "Recall of the job's audit",
                        "percentunit",
                        [Query(f"max({ray('ray_trackstar_reindex_audit_recall')}) >= 0", "recall")],
                        width=12,
                    ),
                ],
            ),
        ],
    )


def quality() -> Dashboard:
    """Whether what answers is right: audits, and how far answers stand out."""
    return dashboard(
        "quality",
        "Quality",
        [
            (
                "The generation that answers",
                [
                    number(
                        "Generation",
                        "short",
                        Query(f"count by (generation) ({gateway('trackstar_generation_info')})", "{{generation}}"),
                        about="The number of gateways that answer from it.",
                        width=12,
                    ),
                    number(
                        "Last audit passed",
                        "bool_yes_no",
                        Query(f"min by (generation) ({gateway('trackstar_audit_passed')})", "{{generation}}"),
                    ),
                    number(
                        "Sampled codes that were not those of their rows",
                        "short",
                        Query(f"max by (generation) ({gateway('trackstar_audit_codes_differing')})", "{{generation}}"),
                    ),
                    lines(
                        "Recall of the last audit",
                        "percentunit",
                        [
                            Query(f"min by (generation) ({gateway('trackstar_audit_recall')})", "{{generation}}"),
                            Query(
                                f"min by (generation) ({gateway('trackstar_audit_expected_recall')})",
                                "{{generation}}, expected",
                            ),
                        ],
                        about="Share of the exact best passages found, and what the coarse code lets expect.",
                        width=24,
                        lowest=None,
                    ),
                ],
            ),
            (
                "Drift of scores",
                [
                    lines(
                        f"Z-score of the best proponent, {name}",
                        "short",
                        [
                            Query(_best_z_score(quantile, ""), "now"),
                            Query(_best_z_score(quantile, " offset 1w"), "a week before"),
                        ],
                        about="How far the best passage of a trace without a filter stands out of the background. "
                        "If it moves, callers ask something else, or the generation answers otherwise.",
                        lowest=None,
                    )
                    for quantile, name in ((0.1, "10th percentile"), (0.5, "median"), (0.9, "90th percentile"))
                ],
            ),
        ],
    )


def _stage(quantile: float) -> str:
    return f"histogram_quantile({quantile}, {rate(gateway('trackstar_stage_duration_seconds_bucket'), 'le', 'stage')})"


def _best_z_score(quantile: float, offset: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (rate({gateway('trackstar_best_z_score_bucket')}[1h]{offset})))"


DASHBOARDS = {made.__name__: made for made in (calls, stages, encoders, jobs, quality)}


def as_json(made: Dashboard) -> str:
    """A dashboard as it is kept."""
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(as_json(make()), encoding="utf-8")


if __name__ == "__main__":
    main()
