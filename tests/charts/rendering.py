"""Renders the chart with Helm's own engine, and holds objects against the schemas of their kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from helm_python import Chart
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "trackstar"
PRESETS = ROOT / "deploy" / "values"
SCHEMAS = Path(__file__).parent / "schemas"
# The oldest and the newest version of Kubernetes that objects are held against.
VERSIONS = ("1.29", "1.37")

Values = dict[str, Any]
Object = dict[str, Any]

NAMES = ("laptop", "single-gpu", "cluster", "billions")

# The least that an installation must say.
MINIMAL: Values = {"index": {"claim": "index"}}


def merged(*parts: Values) -> Values:
    """Values over each other, as Helm does with several -f."""
    found: Values = {}
    for part in parts:
        for key, value in part.items():
            old = found.get(key)
            found[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def preset(name: str) -> Values:
    """The values of deploy/values/NAME.yaml."""
    found: Values = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def render(values: Values | None = None, *, release: str = "ts", namespace: str = "prod") -> list[Object]:
    """All objects, those of hooks too."""
    files = _files(json.dumps(values or {}), release, namespace)
    manifests = (text for name, text in sorted(files.items()) if name.endswith(".yaml"))
    return [made for text in manifests for made in yaml.safe_load_all(text) if made]


def notes(values: Values, *, release: str = "ts", namespace: str = "prod") -> str:
    """What `helm install` says at the end."""
    return _files(json.dumps(values), release, namespace)["trackstar/templates/NOTES.txt"]


@cache
def _files(values: str, release: str, namespace: str) -> dict[str, str]:
    with Chart.load(str(CHART)) as chart:
        return chart.render(values=json.loads(values), name=release, namespace=namespace)


def of_kind(objects: list[Object], kind: str, name: str = "") -> list[Object]:
    """The objects of a kind; with `name`, whose name ends so."""
    return [made for made in objects if made["kind"] == kind and made["metadata"]["name"].endswith(name)]


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind."""
    (found,) = of_kind(objects, kind, name)
    return found


def gateway_pod(objects: list[Object]) -> dict[str, Any]:
    """The template of the gateway's pods."""
    found: dict[str, Any] = one(objects, "Deployment")["spec"]["template"]
    return found


def check(made: Object) -> None:
    """Strictly against the schema of its kind; unknown fields are refused.

    Raises:
        Exception: it does not fit; the message says where.
    """
    schema = custom_schema(made["kind"])
    if schema is None:
        for version in VERSIONS:
            _check_kubernetes(json.dumps(made), version)
        return
    Draft7Validator(schema).validate({key: value for key, value in made.items() if key != "metadata"})
    for template in pod_templates(made):
        check(
            {
                "apiVersion": "v1",
                "kind": "PodTemplate",
                "metadata": {"name": "of-a-custom-resource"},
                "template": template,
            }
        )


@cache
def _check_kubernetes(made: str, version: str) -> None:
    """Objects that several renderings share are looked at once."""
    kubernetes_validate.validate(json.loads(made), version, strict=True)


def pod_templates(made: Object) -> Iterator[Object]:
    """Every pod template in an object, and a pod itself."""
    if made["kind"] == "Pod":
        yield made
        return
    waiting: list[Any] = [made.get("spec")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            if isinstance(part.get("spec"), dict) and "containers" in part["spec"]:
                yield part
            else:
                waiting += part.values()
        elif isinstance(part, list):
            waiting += part


@cache
def custom_schema(kind: str) -> Values | None:
    """The schema of a custom resource, closed at every level; None for kinds of Kubernetes itself."""
    path = SCHEMAS / f"{kind.lower()}.json"
    if not path.is_file():
        return None
    schema = _closed(json.loads(path.read_text(encoding="utf-8")))
    schema["properties"].pop("metadata", None)
    return schema  # type: ignore[no-any-return]


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"type": "object"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {
        key: {name: _closed(value) for name, value in item.items()} if key == "properties" else _closed(item)
        for key, item in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("format", "nullable")
    }
    if "properties" in found and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found
