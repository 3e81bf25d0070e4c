"""Rendered rules, expressions and what they name; promtool and Prometheus as they are installed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.charts.rendering import MINIMAL, ROOT, Values, merged, one, render

RUNBOOKS = ROOT / "docs" / "runbooks"
RELEASE, NAMESPACE = "ts", "prod"
JOB = "ts-trackstar-gateway-headless"
MILVUS_MEMORY_BYTES = 8 << 30

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="prometheus and promtool are not installed (Debian's package `prometheus`)",
)


def rules(**objectives: Any) -> dict[str, Any]:
    """The PrometheusRule's spec, all rules in it, with other objectives than the chart's own."""
    values: Values = {
        "monitoring": {"enabled": True, "objectives": {"milvusMemoryBytes": MILVUS_MEMORY_BYTES, **objectives}}
    }
    objects = render(merged(MINIMAL, values), release=RELEASE, namespace=NAMESPACE)
    spec: dict[str, Any] = one(objects, "PrometheusRule")["spec"]
    return spec


def rules_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All rules of a spec."""
    return [rule for group in spec["groups"] for rule in group["rules"]]


@dataclass(frozen=True, slots=True)
class Selector:
    """A series that an expression names, and its matchers: label, operator, value."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(expr: str) -> Iterator[Selector]:
    """All series that an expression names; each is written with braces, or it is none."""
    for name, inside in re.findall(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^{}]*)\}", expr):
        matchers = re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', inside)
        yield Selector(name, tuple(matchers))


def grouped_by(expr: str) -> set[str]:
    """Labels by which an expression groups."""
    return {label.strip() for labels in re.findall(r"\bby \(([^)]*)\)", expr) for label in labels.split(",")}


def series(name: str, **labels: str) -> str:
    """A series as Prometheus writes it."""
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in labels.items()) + "}"


def written_out(book: Path) -> list[str]:
    """Expressions that a runbook tells to ask: indented lines that are no commands."""
    lines = re.findall(
        r"^    (?!kubectl |trackstar |python )(\S.*\{.*)", book.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [line.replace("NAMESPACE", NAMESPACE) for line in lines]
