"""Makes charts/trackstar/values.schema.json: the chart's own values here, the services' from their classes.

Contract: strict at every level; what Kubernetes itself defines (resources, tolerations, peers, …) is left to its API.
A test makes the file again and compares.

    python -m deploy.values_schema
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from services.gateway.config import GatewayConfig
from services.reindex.config import ReindexConfig
from services.serve.config import ServeConfig

PATH = Path(__file__).parents[1] / "charts" / "trackstar" / "values.schema.json"

Schema = dict[str, Any]

# What the chart itself says of the gateway; a value of the user's would break what is mounted or probed.
_OWN = ("listen", "tls", "auth", "backends", "milvus", "tracing", "reindex", "drain_seconds")


def make() -> Schema:
    """The schema."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart trackstar",
        **_section(
            nameOverride=_text(max=40),
            fullnameOverride=_text(max=40),
            commonLabels=_texts(),
            mode={"enum": ["embedded", "distributed"]},
            images=_section(gateway=_image(), ray=_image()),
            imagePullSecrets={"type": "array", "items": _section(name=_text(min=1))},
            index=_section(location=_text(min=1), claim=_name(), mountPath=_path()),
            checkpoint=_section(path=_text(), claim=_name(), mountPath=_path()),
            objectStore=_section(secret=_name(), environment=_variables()),
            milvus=_section(
                address=_text(pattern=r"^([^\s/:]+:[0-9]{1,5})?$"),
                database=_text(),
                collectionPrefix=_text(pattern=r"^[A-Za-z_]\w{0,100}$"),
                tokenSecret=_name(),
                tls=_BOOLEAN,
                caSecret=_name(),
            ),
            gateway=_gateway(),
            ray=_section(
                version=_text(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$"),
                tokenSecret=_name(),
                autoscaling=_BOOLEAN,
                head=_pods(),
                sharedMemory=_quantity(),
            ),
            serve=_section(workers=_workers(min=1), application=_application(), oldClusterSeconds=_integer(min=0)),
            reindex=_reindex(),
            audit=_cron(),
            collect=_cron(apply=_BOOLEAN),
            demo=_section(enabled=_BOOLEAN),
            tracing=_section(endpoint=_text(pattern="^(https?://.+)?$"), sampleRatio=_number(min=0, max=1)),
            serviceAccount=_section(annotations=_texts()),
            networkPolicy=_section(
                enabled=_BOOLEAN,
                clients=_OBJECTS,
                prometheus=_some(_OBJECTS),
                dns=_some(_OBJECTS),
                kuberay=_some(_OBJECTS),
                egress=_OBJECTS,
                kubernetes=_section(to=_some(_OBJECTS), ports=_some(_list(_integer(min=1, max=65535)))),
            ),
            monitoring=_section(
                enabled=_BOOLEAN,
                labels=_texts(),
                interval=_duration(),
                rules=_BOOLEAN,
                dashboards=_BOOLEAN,
                dashboardLabels=_texts(),
                objectives=_section(
                    availability=_share(),
                    latency=_share(),
                    latencySeconds=_number(above=0),
                    recall=_share(),
                    milvusMemoryBytes=_integer(min=0),
                ),
                runbooks=_text(pattern="^https?://.+"),
            ),
            test=_section(tokenSecret=_name(), certificateSecret=_name(), prompt=_text(min=1), completion=_text(min=1)),
            # Helm hands the values of a parent chart on.
            **{"global": {"type": "object"}},
        ),
    }


def _gateway() -> Schema:
    settings = _of(GatewayConfig)
    for section in _OWN:
        del settings["properties"][section]
    return _section(
        replicas=_integer(min=1),
        maxSurge=_integer(min=0),
        device=_text(min=1),
        resources=_RESOURCES,
        principalsSecret=_name(),
        settings=settings,
        drainSeconds=_integer(min=0, max=3600),
        tls=_section(
            enabled=_BOOLEAN,
            secret=_name(),
            requireClientCertificate=_BOOLEAN,
            certManager=_section(
                enabled=_BOOLEAN,
                issuer=_section(name=_name(), kind={"enum": ["Issuer", "ClusterIssuer"]}),
                dnsNames=_list(_text(min=1)),
                duration=_duration(),
                renewBefore=_duration(),
            ),
        ),
        service=_section(
            type={"enum": ["ClusterIP", "LoadBalancer"]}, port=_integer(min=1, max=65535), annotations=_texts()
        ),
        autoscaling=_section(
            kind={"enum": ["none", "hpa", "keda"]},
            minReplicas=_integer(min=1),
            maxReplicas=_integer(min=1),
            inFlightPerReplica=_integer(min=1),
            prometheusAddress=_text(pattern="^(https?://.+)?$"),
        ),
        maxUnavailable=_integer(min=0),
        nodeSelector=_texts(),
        tolerations=_OBJECTS,
        affinity={"type": "object"},
        podAnnotations=_texts(),
        priorityClassName=_name(),
        ingress=_section(enabled=_BOOLEAN, className=_name(), host=_text(), annotations=_texts(), tlsSecret=_name()),
        route=_section(enabled=_BOOLEAN, parentRefs=_OBJECTS, hostnames=_list(_text(min=1))),
    )


def _reindex() -> Schema:
    return _section(
        enabled=_BOOLEAN,
        suspend=_BOOLEAN,
        queue=_name(),
        config=_of(ReindexConfig, without=("index", "milvus", "ray_address"), partial=True),
        backoffLimit=_integer(min=0),
        activeDeadlineSeconds=_integer(min=1),
        clusterSeconds=_integer(min=0),
        head=_pods(),
        workers=_workers(),
        throughGateway=_section(enabled=_BOOLEAN, allowedPaths=_list(_text(min=1))),
    )


def _application() -> Schema:
    return _of(ServeConfig, without=("index", "model", "tracing_endpoint"))


def _of(settings: type[BaseModel], *, without: tuple[str, ...] = (), partial: bool = False) -> Schema:
    """A class's own schema, its references resolved; titles and defaults are left out.

    `without` are keys that the chart sets; with `partial`, none that is left need be there.
    """
    made = settings.model_json_schema()
    definitions = made.pop("$defs", {})
    schema: Schema = _plain(made, definitions)
    for key in without:
        del schema["properties"][key]
    required = [key for key in schema.pop("required", []) if key not in without]
    return schema if partial or not required else {**schema, "required": required}


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_plain(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    found = {
        key: (
            {name: _plain(value, definitions) for name, value in item.items()}
            if key == "properties"
            else _plain(item, definitions)
        )
        for key, item in schema.items()
        if key not in ("title", "default", "discriminator", "format")
    }
    return found


_BOOLEAN: Schema = {"type": "boolean"}
_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}


def _section(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _text(*, min: int = 0, max: int | None = None, pattern: str | None = None) -> Schema:
    found: Schema = {"type": "string"}
    if min:
        found["minLength"] = min
    if max is not None:
        found["maxLength"] = max
    if pattern is not None:
        found["pattern"] = pattern
    return found


def _name() -> Schema:
    """Name of an object, or nothing."""
    return _text(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max=253)


def _path() -> Schema:
    return _text(pattern="^/.+")


def _duration() -> Schema:
    return _text(pattern="^([0-9]+(ms|s|m|h))+$")


_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


def _quantity() -> Schema:
    return {"anyOf": [_text(pattern=_QUANTITY), {"type": "number", "minimum": 0}]}


def _texts() -> Schema:
    return {"type": "object", "additionalProperties": {"type": "string"}}


def _variables() -> Schema:
    """Environment variables; what is to be kept secret comes from a Secret."""
    return {**_texts(), "propertyNames": {"not": {"pattern": "SECRET|TOKEN|PASSWORD|ACCESS_KEY"}}}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _some(items: Schema) -> Schema:
    return {**items, "minItems": 1}


def _integer(*, min: int, max: int | None = None) -> Schema:
    return {"type": "integer", "minimum": min, **({} if max is None else {"maximum": max})}


def _number(*, min: float | None = None, max: float | None = None, above: float | None = None) -> Schema:
    bounds = {"minimum": min, "maximum": max, "exclusiveMinimum": above}
    return {"type": "number", **{name: bound for name, bound in bounds.items() if bound is not None}}


def _share() -> Schema:
    return {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}


def _image() -> Schema:
    return _section(
        repository=_text(min=1),
        tag=_text(),
        digest=_text(pattern="^(sha256:[0-9a-f]{64})?$"),
        pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    )


_AMOUNTS: Schema = {"type": "object", "additionalProperties": _quantity()}
_RESOURCES: Schema = {
    **_section(requests=_AMOUNTS, limits=_AMOUNTS),
    "required": ["requests", "limits"],
}


def _pods(**more: Schema) -> Schema:
    return _section(
        resources=_RESOURCES, nodeSelector=_texts(), tolerations=_OBJECTS, priorityClassName=_name(), **more
    )


def _workers(*, min: int = 0) -> Schema:
    group = _pods(
        name=_text(pattern="^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$"),
        minReplicas=_integer(min=0),
        maxReplicas=_integer(min=1),
    )
    group["required"] = ["name", "minReplicas", "maxReplicas", "resources"]
    return {"type": "array", "items": group, **({"minItems": min} if min else {})}


def _cron(**more: Schema) -> Schema:
    return _section(
        enabled=_BOOLEAN,
        schedule=_text(pattern=r"^\S+ \S+ \S+ \S+ \S+$"),
        resources=_RESOURCES,
        activeDeadlineSeconds=_integer(min=1),
        **more,
    )


if __name__ == "__main__":
    PATH.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
