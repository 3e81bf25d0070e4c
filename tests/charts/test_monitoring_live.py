"""Rules and dashboards against a service that runs: every series that they name is there with its labels, every
expression is answered by a Prometheus that scrapes it, and an alert fires when its cause is made and clears after.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.monitoring.dashboards import FOLDER
from services.gateway.metrics import Rejected
from tests.audits import audited
from tests.charts import series as known
from tests.charts.prometheus import (
    JOB,
    NAMESPACE,
    RUNBOOKS,
    grouped_by,
    needs_prometheus,
    rules,
    rules_of,
    selectors,
    series,
    written_out,
)
from tests.charts.prometheus_process import PrometheusProcess, wait_until
from tests.service import demo_index
from tests.service.job_stand_in import COMMAND
from tests.service.ray_process import free_port
from tests.service.serve_process import ServeProcess
from trackstar.client import Client
from trackstar.client_retry import RetryPolicy
from trackstar.errors import CorruptArtifact, InvalidRequest, NotReady, TrackstarError
from trackstar.index import Index

ONCE = RetryPolicy(attempts=1)
OPTIONS: dict[str, Any] = {"k": 4, "candidates": 50, "exactness": "cascade", "timeout_seconds": 30}
# Time in the rules runs faster: five minutes become ten seconds.
FASTER = 30
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A service with its model in one process, and beside it a gateway whose backends are gone."""

    index: Path
    whole: ServeProcess
    alone: ServeProcess


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    root = tmp_path_factory.mktemp("watched")
    index = demo_index.build(root)
    audited(index, Index(index).active(), demo_index.NUM_PASSAGES)
    jobs = root / "reindex.yaml"
    jobs.write_text("{steps: 2, build: {corpus: {paths: [a]}}}")
    whole = ServeProcess(
        index,
        root,
        REINDEX__CONFIG_FILE=str(jobs),
        REINDEX__ENTRYPOINT=yaml.safe_dump(list(COMMAND)),
        REINDEX__ENVIRONMENT=yaml.safe_dump({"PYTHONPATH": str(Path(__file__).parents[2])}),
    )
    with contextlib.ExitStack() as running:
        running.callback(whole.close)
        nowhere = f"127.0.0.1:{free_port()}"
        alone = ServeProcess(
            index, root, "gateway", BACKENDS__ENCODER_ADDRESS=nowhere, BACKENDS__RERANKER_ADDRESS=nowhere
        )
        running.callback(alone.close)
        ask_everything(whole)
        with Client(alone.address, retry=ONCE) as client, pytest.raises(NotReady):
            client.trace(*demo_index.QUERIES[0], k=4, timeout_seconds=10)
        yield System(index=index, whole=whole, alone=alone)


def ask_everything(service: ServeProcess) -> None:
    """A call of every kind, one that is refused, and a job."""
    prompt, target = demo_index.QUERIES[0]
    with Client(service.address, retry=ONCE) as client:
        client.trace(prompt, target, **OPTIONS)
        list(client.trace_stream(prompt, target, **OPTIONS))
        client.passages([1, 2])
        client.verify(prompt, target, [1])
        with pytest.raises(InvalidRequest):
            client.passages([demo_index.NUM_PASSAGES], generation="no generation has such a name!")
        assert list(client.watch_job(client.create_reindex_job("watched").job_id))[-1].state == "succeeded"


def scraped(*services: ServeProcess) -> dict[str, dict[str, set[str]]]:
    """Label values by label by series of what services tell now."""
    found: dict[str, dict[str, set[str]]] = {}
    for service in services:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.metrics_port}/metrics") as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
    return found


def panels() -> list[tuple[str, str]]:
    """Expression of every panel, and where it is."""
    return [
        (f"{path.stem}: {panel['title']}", target["expr"])
        for path in sorted(FOLDER.glob("*.json"))
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
        for target in panel.get("targets", ())
    ]


def expressions() -> list[tuple[str, str]]:
    """Every expression of rules, panels and runbooks, and where it is."""
    of_rules = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules_of(rules())]
    of_books = [(book.name, expr) for book in sorted(RUNBOOKS.glob("*.md")) for expr in written_out(book)]
    return of_rules + panels() + of_books


def test_every_series_that_is_named_is_there_with_its_labels(system: System) -> None:
    there: dict[str, dict[str, set[str]]] = scraped(system.whole, system.alone)
    recorded = {rule["record"] for rule in rules_of(rules()) if "record" in rule}
    wrong = []
    for place, expr in expressions():
        named = list(selectors(expr))
        assert named, f"{place} names no series: {expr}"
        labels: set[str] = set()
        for selector in named:
            if selector.name in recorded | known.OF_PROMETHEUS:
                values: dict[str, set[str]] = {}
            elif selector.name in known.ELSEWHERE:
                values = {label: set() for label in known.ELSEWHERE[selector.name]}
            elif selector.name in there:
                values = there[selector.name]
            else:
                wrong.append(f"{place}: nobody tells of {selector.name}")
                continue
            labels |= set(values)
            for label, operator, value in selector.matchers:
                if label not in values.keys() | known.TARGET_LABELS:
                    wrong.append(f"{place}: {selector.name} has no label {label}")
                # Codes are whatever went wrong; test_monitoring_rules.py looks at them.
                elif label in there.get(selector.name, {}) and label != "code":
                    unseen = set(value.split("|") if operator == "=~" else [value]) - values[label]
                    wrong += [f"{place}: {selector.name} has no {label} {name}" for name in unseen]
        if left := grouped_by(expr) - labels - known.TARGET_LABELS:
            wrong.append(f"{place}: groups by {left}, which nothing in it has")
    assert not wrong, "\n".join(wrong)


def test_every_series_of_the_gateway_is_watched(system: System) -> None:
    watched = {selector.name for _, expr in expressions() for selector in selectors(expr)}
    told = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in scraped(system.whole, system.alone)}
    assert {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in watched} >= {
        name for name in told if name.startswith("trackstar_")
    }


class Elsewhere:
    """Tells of the series that Ray and cAdvisor tell of, as if all of it were there; counters rise."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = outer.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._scrapes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_port}"

    def text(self) -> str:
        """One sample of everything."""
        self._scrapes += 1
        lines = []
        for name, labels in known.ELSEWHERE.items():
            rises = name.endswith(("_total", "_sum", "_count", "_bucket"))
            given = {label: {"le": "+Inf", "pod": "milvus-0"}.get(label, "any") for label in labels}
            lines.append(f"{series(name, **given)} {self._scrapes if rises else 1}")
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """Tell no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def prometheus(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusProcess]:
    """Scrapes the service as the chart's monitors would have it, and evaluates the rules, faster."""
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(faster(rules())))
    elsewhere = Elsewhere()
    targets = {
        # A Service's name is among the labels that the operator gives, where the gateway's own `service` would be.
        f"127.0.0.1:{service.metrics_port}": {"job": JOB, "namespace": NAMESPACE, "pod": pod, "service": JOB}
        for pod, service in (("gateway-0", system.whole), ("gateway-1", system.alone))
    }
    targets[elsewhere.address] = {"job": "elsewhere", "namespace": NAMESPACE, "pod": "ray-0"}
    process = PrometheusProcess(folder, folder / "rules.yaml", targets)
    yield process
    process.close()
    elsewhere.close()


def faster(spec: dict[str, Any]) -> dict[str, Any]:
    """Rules whose every window and patience is shorter."""
    for group in spec["groups"]:
        group.pop("interval", None)
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\w+)\]", lambda found: f"[{_shorter(found[1])}]", rule["expr"])
            if "for" in rule:
                rule["for"] = _shorter(rule["for"])
    return spec


def _shorter(duration: str) -> str:
    return f"{int(duration[:-1]) * _SECONDS[duration[-1]] * 1000 // FASTER}ms"


def put_in(expr: str) -> str:
    """An expression of a panel, with what Grafana puts in; a week before is a second before."""
    given = {"$namespace": NAMESPACE, "$gateway": JOB, "$__rate_interval": "20s", "offset 1w": "offset 1s"}
    for name, value in given.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


@needs_prometheus
def test_every_expression_is_answered(prometheus: PrometheusProcess) -> None:
    for _, expr in expressions():
        prometheus.query(put_in(expr))
    missing = {expr: place for place, expr in panels()}

    def is_answered() -> bool:
        for expr in list(missing):
            if prometheus.query(put_in(expr)):
                del missing[expr]
        return not missing

    with contextlib.suppress(AssertionError):
        wait_until(is_answered, seconds=60, what="every panel shows something")
    assert not missing, "\n".join(f"{place} shows nothing: {expr}" for expr, place in missing.items())


@needs_prometheus
def test_an_alert_fires_when_its_cause_is_made_and_clears_after(system: System, prometheus: PrometheusProcess) -> None:
    def burns() -> list[dict[str, Any]]:
        return [
            alert
            for alert in prometheus.firing()
            if alert["labels"]["alertname"] == "TrackstarErrorBudgetBurn" and alert["labels"]["long"] == "1h"
        ]

    shard = system.index / "rows" / "000001.safetensors"
    whole = shard.read_bytes()
    outcomes: list[str] = []
    with Client(system.whole.address, retry=ONCE) as client:

        def ask() -> None:
            try:
                client.trace(*demo_index.QUERIES[0], **OPTIONS)
                outcomes.append("answered")
            except TrackstarError as error:
                outcomes.append(type(error).__name__)

        wait_until(lambda: not burns(), seconds=120, what="nothing burns yet", meanwhile=[ask])
        # In place: the service holds the file open.
        with shard.open("r+b") as stream:
            stream.seek(len(whole) // 2)
            stream.write(os.urandom(len(whole) - len(whole) // 2))
        wait_until(burns, seconds=120, what="the alert fires", meanwhile=[ask])
        assert CorruptArtifact.__name__ in outcomes
        (alert,) = burns()
        assert alert["labels"]["severity"] == "critical"
        assert re.match(
            r"[\d.]+% of the calls of the last 1h to ts-trackstar in prod failed", alert["annotations"]["description"]
        )
        with shard.open("r+b") as stream:
            stream.write(whole)
        wait_until(lambda: not burns(), seconds=120, what="the alert clears", meanwhile=[ask])
    assert outcomes[-1] == "answered"


@needs_prometheus
def test_what_fires_reads_well(system: System, prometheus: PrometheusProcess) -> None:
    def breaks() -> bool:
        return any(alert["labels"]["alertname"] == "TrackstarBreakerOpen" for alert in prometheus.firing())

    with Client(system.alone.address, retry=ONCE) as client:

        def ask() -> None:
            with contextlib.suppress(TrackstarError):
                client.trace(*demo_index.QUERIES[0], k=4, timeout_seconds=5)

        wait_until(breaks, seconds=60, what="the breaker's alert fires", meanwhile=[ask])
    for alert in prometheus.firing():
        for text in alert["annotations"].values():
            assert not re.search(r"\{\{|\$|<no value>|<error|map\[", text), text


def test_reasons_of_refusals_are_the_gateways() -> None:
    named = {
        value
        for _, expr in expressions()
        for selector in selectors(expr)
        for label, _, values in selector.matchers
        if label == "reason"
        for value in values.split("|")
    }
    assert named <= set(Rejected)
