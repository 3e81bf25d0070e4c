"""The rendered rules, by promtool: each alert fires when its cause is there, then, and not otherwise."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc import StatusCode
from helm_python.errors import HelmRenderError

from deploy.monitoring.dashboards import DASHBOARDS
from services.gateway.metrics import GatewayMetrics
from tests.charts.prometheus import (
    JOB,
    MILVUS_MEMORY_BYTES,
    NAMESPACE,
    RUNBOOKS,
    needs_prometheus,
    rules,
    rules_of,
    selectors,
    series,
)
from tests.charts.rendering import MINIMAL, ROOT, merged, render

PAGE = ROOT / "docs" / "monitoring.md"
ALERTS = {rule["alert"] for rule in rules_of(rules()) if "alert" in rule}
# Labels by which the tests tell alerts of one name apart.
TOLD_APART = ("severity", "long", "backend", "generation", "pod")

Labels = dict[str, str]


def of(name: str, *, pod: str = "a", **labels: str) -> str:
    """A series of a gateway."""
    return series(name, namespace=NAMESPACE, job=JOB, pod=pod, **labels)


def of_ray(name: str, **labels: str) -> str:
    """A series of a Ray node."""
    return series(name, namespace=NAMESPACE, job="prod/ts-trackstar-ray", pod="head", **labels)


def handled(code: str, *, method: str = "Trace", pod: str = "a") -> str:
    return of("trackstar_rpc_handled_total", pod=pod, method=method, code=code)


@dataclass(frozen=True, slots=True)
class Case:
    """One alert under one course of events.

    series: values by minute, in promtool's notation. firing: by minute, the labels of those that fire then.
    """

    name: str
    alert: str
    series: Mapping[str, str]
    firing: Mapping[int, Sequence[Labels]]

    def __str__(self) -> str:
        return f"{self.alert}: {self.name}"


CRITICAL, WARNING = {"severity": "critical"}, {"severity": "warning"}
# An hour of good calls, an hour of bad ones among them, and good ones again.
BAD_HOUR, QUIET = "0x60 0+{per_minute}x60 {total}x400", "0+100x600"


def burn(name: str) -> list[Labels]:
    severity = "critical" if name in ("1h", "6h") else "warning"
    return [{"severity": severity, "long": name}]


def latency(slow: str) -> dict[str, str]:
    return {
        of("trackstar_rpc_duration_seconds_count", method="Trace"): "0+100x600",
        of("trackstar_rpc_duration_seconds_bucket", method="Trace", le="2.5"): slow,
        of("trackstar_rpc_duration_seconds_bucket", method="Trace", le="5.0"): "0+100x600",
    }


GENERATION = {"generation": "one", "checkpoint": "c"}
RUNNING = of("trackstar_reindex_jobs", state="running")
ENCODED = of("trackstar_reindex_shards", state="encoded")

CASES = [
    Case(
        "an hour in which a tenth of the calls fails, told fast and then slowly, each until its short window is over",
        "TrackstarErrorBudgetBurn",
        {handled("OK"): "0+90x600", handled("UNAVAILABLE"): BAD_HOUR.format(per_minute=10, total=600)},
        {
            60: [],
            65: [],
            75: burn("1h"),
            100: burn("1h") + burn("6h"),
            130: burn("6h") + burn("1d"),
            160: burn("1d"),
            300: burn("3d"),
            490: [],
        },
    ),
    *(
        Case(
            f"{code} is our fault",
            "TrackstarErrorBudgetBurn",
            {handled("OK", method=method): "0+90x100", handled(code, method=method): "0+10x100"},
            {10: burn("1h")},
        )
        for code, method in (
            ("INTERNAL", "Trace"),
            ("UNKNOWN", "TraceStream"),
            ("DATA_LOSS", "GetPassages"),
            ("UNAVAILABLE", "Verify"),
            ("FAILED_PRECONDITION", "Trace"),
            ("DEADLINE_EXCEEDED", "Trace"),
        )
    ),
    Case(
        "what callers do wrong, leave, or are refused is not our fault",
        "TrackstarErrorBudgetBurn",
        {
            handled("OK"): QUIET,
            **{
                handled(code): "0+50x600"
                for code in ("INVALID_ARGUMENT", "NOT_FOUND", "CANCELLED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED")
            },
            handled("UNAVAILABLE", method="Activate"): "0+50x600",
        },
        {10: [], 100: []},
    ),
    Case(
        "one call in two thousand may fail",
        "TrackstarErrorBudgetBurn",
        {handled("OK"): "0+2000x600", handled("INTERNAL"): "0+1x600"},
        {10: [], 100: []},
    ),
    Case("nobody calls", "TrackstarErrorBudgetBurn", {handled("OK"): "7x600"}, {10: []}),
    Case(
        "failures of one gateway among two",
        "TrackstarErrorBudgetBurn",
        {handled("OK"): "0+50x100", handled("INTERNAL", pod="b"): "0+50x100"},
        {10: burn("1h")},
    ),
    Case(
        "an hour in which two traces of five are slow",
        "TrackstarLatencyBudgetBurn",
        latency("0+100x60 6060+60x60 9700+100x400"),
        {65: [], 95: burn("1h") + burn("6h"), 130: burn("6h") + burn("1d"), 490: []},
    ),
    Case(
        "one in two hundred may be slow",
        "TrackstarLatencyBudgetBurn",
        latency("0+99.5x600"),
        {10: [], 100: []},
    ),
    Case(
        "slow jobs are no slow traces",
        "TrackstarLatencyBudgetBurn",
        {
            of("trackstar_rpc_duration_seconds_count", method="WatchReindexJob"): "0+100x600",
            of("trackstar_rpc_duration_seconds_bucket", method="WatchReindexJob", le="2.5"): "0x600",
        },
        {100: []},
    ),
    Case(
        "the only gateway stops answering, and comes back",
        "TrackstarGatewayDown",
        {of("up"): "1x10 0x10 1x10"},
        {5: [], 12: [], 14: [CRITICAL], 20: [CRITICAL], 22: []},
    ),
    Case("its targets are gone", "TrackstarGatewayDown", {of("up"): "1x10 _x30"}, {10: [], 30: [CRITICAL]}),
    Case(
        "one of two is enough",
        "TrackstarGatewayDown",
        {of("up"): "0x30", of("up", pod="b"): "1x30"},
        {20: []},
    ),
    Case(
        "a tenth of the calls is refused for half an hour",
        "TrackstarRefusesCalls",
        {
            handled("OK"): "0+90x60",
            handled("RESOURCE_EXHAUSTED"): "0+10x30 310x30",
            of("trackstar_rejected_total", reason="queue_full"): "0+6x30 186x30",
            of("trackstar_rejected_total", reason="queue_timeout"): "0+4x30 124x30",
        },
        {5: [], 15: [WARNING], 30: [WARNING], 45: []},
    ),
    Case(
        "a few, and those without a token",
        "TrackstarRefusesCalls",
        {
            handled("OK"): "0+99x60",
            of("trackstar_rejected_total", reason="queue_full"): "0+1x60",
            of("trackstar_rejected_total", reason="unauthenticated"): "0+50x60",
        },
        {30: []},
    ),
    Case(
        "a backend is down, tried again and again, and back",
        "TrackstarBreakerOpen",
        {
            of("trackstar_breaker_state", backend="milvus"): "0x5 2 1 2 2 1 2 0x10",
            of("trackstar_breaker_state", backend="encoder"): "0x20",
        },
        {5: [], 7: [], 9: [{**CRITICAL, "backend": "milvus"}], 11: [{**CRITICAL, "backend": "milvus"}], 13: []},
    ),
    Case(
        "a defect is told for a quarter of an hour",
        "TrackstarDefects",
        {of("trackstar_defects_total"): "0x10 1x40"},
        {10: [], 13: [WARNING], 30: []},
    ),
    Case(
        "an audit finds too little, and the next generation enough",
        "TrackstarRecallBelowTarget",
        {
            of("trackstar_audit_recall", generation="one"): "0.85x20 _x20",
            of("trackstar_audit_recall", generation="two"): "_x20 0.95x20",
        },
        {4: [], 6: [{**WARNING, "generation": "one"}], 30: []},
    ),
    Case(
        "exactly the target is enough",
        "TrackstarRecallBelowTarget",
        {of("trackstar_audit_recall", generation="one"): "0.9x20"},
        {10: []},
    ),
    Case(
        "a generation answers, and is audited later",
        "TrackstarGenerationWithoutAudit",
        {
            of("trackstar_generation_info", **GENERATION): "1x40",
            of("trackstar_audit_recall", generation="one"): "_x20 0.95x20",
        },
        {4: [], 6: [{**WARNING, "generation": "one"}], 22: []},
    ),
    Case(
        "an audit of another generation does not count, one that another gateway tells of does",
        "TrackstarGenerationWithoutAudit",
        {
            of("trackstar_generation_info", **GENERATION): "1x40",
            of("trackstar_generation_info", pod="b", **{**GENERATION, "generation": "two"}): "1x40",
            of("trackstar_audit_recall", pod="c", generation="two"): "0.95x40",
        },
        {10: [{**WARNING, "generation": "one"}]},
    ),
    Case(
        "the last audit failed, and the next one passes",
        "TrackstarAuditFailed",
        {of("trackstar_audit_passed", generation="one"): "0x20 1x20"},
        {4: [], 6: [{**CRITICAL, "generation": "one"}], 22: []},
    ),
    Case(
        "a job stops getting on half an hour in, and is ended",
        "TrackstarReindexStalled",
        {RUNNING: "1x180 0x60", ENCODED: "0 0 0 0 0 1 1 1 1 1 2 2 2 2 2 3 3 3 3 3 4 4 4 4 4 5 5 5 5 5 6x210"},
        {60: [], 100: [], 110: [WARNING], 180: [WARNING], 183: []},
    ),
    Case(
        "a shard every ten minutes is getting on",
        "TrackstarReindexStalled",
        {RUNNING: "1x210", ENCODED: " ".join(f"{shard}x9" for shard in range(21))},
        {120: [], 200: []},
    ),
    Case(
        "nothing runs, then a job plans for forty minutes",
        "TrackstarReindexStalled",
        {RUNNING: "0x120 1x100", ENCODED: "0x160 1+1x60"},
        {119: [], 159: [], 200: []},
    ),
    Case(
        "a RayJob stops getting on",
        "TrackstarReindexStalled",
        {
            of_ray("ray_trackstar_reindex_shards", state="encoded"): "0+1x10 10x200",
            of_ray("ray_trackstar_reindex_stage", state="ACTIVE"): "0x200",
        },
        {60: [], 90: [WARNING]},
    ),
    Case(
        "a RayJob is done and its cluster still there",
        "TrackstarReindexStalled",
        {
            of_ray("ray_trackstar_reindex_shards", state="encoded"): "0+1x10 10x200",
            of_ray("ray_trackstar_reindex_stage", state="ACTIVE"): "0x11 1x200",
        },
        {60: [], 90: [], 150: []},
    ),
    Case(
        "a pod of Milvus grows beyond what was planned; sums over a pod and other pods do not count",
        "TrackstarMilvusMemory",
        {
            'container_memory_working_set_bytes{namespace="milvus",pod="milvus-standalone-0",container="standalone"}': (
                f"{MILVUS_MEMORY_BYTES - 1}x10 {MILVUS_MEMORY_BYTES + 1}x20 1x20"
            ),
            'container_memory_working_set_bytes{namespace="milvus",pod="milvus-etcd-0",container=""}': (
                f"{2 * MILVUS_MEMORY_BYTES}x50"
            ),
            'container_memory_working_set_bytes{namespace="prod",pod="big",container="c"}': (
                f"{2 * MILVUS_MEMORY_BYTES}x50"
            ),
        },
        {10: [], 19: [], 23: [{**WARNING, "pod": "milvus-standalone-0"}], 34: []},
    ),
]


@pytest.fixture(scope="module")
def rules_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(rules()))
    return path


@needs_prometheus
def test_promtool_finds_nothing_wrong(rules_file: Path) -> None:
    found = subprocess.run(
        ["promtool", "check", "rules", "--lint-fatal", str(rules_file)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


@needs_prometheus
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_alert_fires_when_its_cause_is_there_and_not_otherwise(case: Case, rules_file: Path, tmp_path: Path) -> None:
    fires = f'max by ({", ".join(TOLD_APART)}) (ALERTS{{alertname="{case.alert}",alertstate="firing"}})'
    wanted = [
        {
            "expr": fires,
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": series("", **labels), "value": 1} for labels in firing],
        }
        for minute, firing in case.firing.items()
    ]
    given = [{"series": name, "values": values} for name, values in case.series.items()]
    test = {
        "rule_files": [str(rules_file)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": wanted}],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    found = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@needs_prometheus
def test_the_page_scrapes_with_a_configuration_that_is_one(rules_file: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    # Debian's Prometheus is built without the part that asks Kubernetes for pods; the rest it can check.
    without, number = re.subn(r"kubernetes_sd_configs: .*", "static_configs: []", block)
    assert number == 1
    path = tmp_path / "prometheus.yaml"
    path.write_text(f"rule_files: [{rules_file}]\n{without}")
    found = subprocess.run(["promtool", "check", "config", str(path)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert JOB.replace("ts-", "RELEASE-", 1) in block


def test_the_page_tells_of_every_alert_and_dashboard() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"\(runbooks/(\w+)\.md\)", page)) == ALERTS
    for make in DASHBOARDS.values():
        title = make().build().title
        assert title is not None
        assert f"| {title.removeprefix('TrackStar / ')} |" in page


def test_every_alert_is_tested_to_fire_and_not_to() -> None:
    assert {case.alert for case in CASES if any(case.firing.values())} == ALERTS
    assert {case.alert for case in CASES if not all(case.firing.values())} == ALERTS


def test_every_alert_says_what_it_is_and_has_a_runbook_and_every_runbook_an_alert() -> None:
    for rule in rules_of(rules()):
        if "alert" not in rule:
            continue
        assert rule["labels"]["severity"] in ("critical", "warning")
        annotations = rule["annotations"]
        assert set(annotations) == {"summary", "description", "runbook_url"}
        assert all(text.endswith(".") for key, text in annotations.items() if key != "runbook_url")
        assert annotations["runbook_url"].endswith(f"/docs/runbooks/{rule['alert']}.md")
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == ALERTS


def test_nothing_is_left_to_be_put_in() -> None:
    assert "${" not in yaml.safe_dump(rules())


def test_objectives_are_the_values_given() -> None:
    text = yaml.safe_dump(rules(availability=0.95, latency=0.8, latencySeconds=10, recall=0.7), width=10_000)
    for wanted in ("14.4 * (1 - 0.95)", "14.4 * (1 - 0.8)", 'le=\\"10.0\\"', "< 0.7", "longer than 10 s"):
        assert wanted in text or wanted.replace("\\", "") in text, wanted
    without = rules(milvusMemoryBytes=0)
    assert "TrackstarMilvusMemory" not in {rule.get("alert") for rule in rules_of(without)}


def test_a_time_between_buckets_is_refused_with_those_there_are() -> None:
    metrics = GatewayMetrics()
    metrics.handled("/x/Y", "OK", 1.0)
    buckets = [
        sample.labels["le"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "trackstar_rpc_duration_seconds_bucket" and sample.labels["le"] != "+Inf"
    ]
    for bucket in (buckets[0], "1.0", buckets[-1]):
        assert f'le="{bucket}"' in yaml.safe_dump(rules(latencySeconds=float(bucket)), width=10_000).replace("\\", "")
    wrong = merged(MINIMAL, {"monitoring": {"enabled": True, "objectives": {"latencySeconds": 3}}})
    with pytest.raises(HelmRenderError, match=re.escape(", ".join(buckets))):
        render(wrong)


def test_the_codes_that_count_are_codes() -> None:
    (codes,) = {
        value
        for rule in rules_of(rules())
        for selector in selectors(rule["expr"])
        for label, operator, value in selector.matchers
        if label == "code" and operator == "=~"
    }
    assert set(codes.split("|")) <= {code.name for code in StatusCode}


def test_rules_can_be_left_out() -> None:
    objects: list[dict[str, Any]] = render(merged(MINIMAL, {"monitoring": {"enabled": True, "rules": False}}))
    assert "PrometheusRule" not in {made["kind"] for made in objects}
