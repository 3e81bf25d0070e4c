"""The chart renders to valid objects whatever is switched, refuses wrong values by name, and comments every value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from helm_python import HelmError
from ray.scripts.scripts import start as ray_start

from deploy import values_schema
from tests.charts.rendering import (
    CHART,
    MINIMAL,
    NAMES,
    PRESETS,
    Object,
    Values,
    check,
    gateway_pod,
    merged,
    notes,
    of_kind,
    one,
    preset,
    render,
)

CORPUS: Values = {"build": {"corpus": {"paths": ["/data/corpus"]}, "model": "/models/checkpoint"}}
EMBEDDED: Values = merged(MINIMAL, {"mode": "embedded"})
TLS: Values = {"gateway": {"tls": {"enabled": True, "secret": "gateway-tls"}}}
ANYWHERE: Values = {"networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}}
MILVUS: Values = merged(ANYWHERE, {"milvus": {"address": "milvus:19530"}})


def settings(objects: list[Object]) -> dict[str, Any]:
    """The gateway's settings."""
    found: dict[str, Any] = yaml.safe_load(one(objects, "ConfigMap", "-gateway")["data"]["gateway.yaml"])
    return found


def job(objects: list[Object]) -> dict[str, Any]:
    """The reindex job's settings."""
    found: dict[str, Any] = yaml.safe_load(one(objects, "ConfigMap", "-reindex")["data"]["job.yaml"])
    return found


def gateway(objects: list[Object]) -> dict[str, Any]:
    """Spec of the gateway's pods."""
    found: dict[str, Any] = gateway_pod(objects)["spec"]
    return found


def arguments(objects: list[Object]) -> list[str]:
    """The gateway's command and arguments."""
    container = gateway(objects)["containers"][0]
    return [*container["command"], *container["args"]]


def volumes(spec: dict[str, Any]) -> dict[str, Any]:
    """Volumes of a pod by their names."""
    return {volume["name"]: volume for volume in spec["volumes"]}


def cluster(objects: list[Object], kind: str = "RayService") -> dict[str, Any]:
    """Spec of a Ray cluster."""
    spec = one(objects, kind)["spec"]
    found: dict[str, Any] = spec["rayClusterConfig" if kind == "RayService" else "rayClusterSpec"]
    return found


def head(objects: list[Object], kind: str = "RayService") -> dict[str, Any]:
    """Spec of the head's pod."""
    found: dict[str, Any] = cluster(objects, kind)["headGroupSpec"]["template"]["spec"]
    return found


def application(objects: list[Object]) -> dict[str, Any]:
    """Arguments of the Serve application."""
    made = yaml.safe_load(one(objects, "RayService")["spec"]["serveConfigV2"])
    found: dict[str, Any] = made["applications"][0]["args"]
    return found


def smoke(objects: list[Object]) -> dict[str, Any]:
    """The pod of `helm test`."""
    return one(objects, "Pod", "-test")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_valid(name: str) -> None:
    objects = render(preset(name))
    for made in objects:
        check(made)
    names = [(made["kind"], made["metadata"]["name"]) for made in objects]
    assert len(set(names)) == len(names)
    assert one(objects, "Deployment")
    assert "helm -n prod test ts" in notes(preset(name))


# What is switched, and what that changes.
SWITCHES: dict[str, tuple[Values, Callable[[list[Object]], object]]] = {
    "nothing": (MINIMAL, lambda o: not of_kind(o, "RayJob") and one(o, "RayService") and not of_kind(o, "Ingress")),
    "names": (
        merged(MINIMAL, {"fullnameOverride": "other"}),
        lambda o: all(made["metadata"]["name"].startswith("other-") for made in o),
    ),
    "name": (
        merged(MINIMAL, {"nameOverride": "tracer"}),
        lambda o: one(o, "Deployment")["metadata"]["name"] == "ts-tracer-gateway",
    ),
    "labels": (
        merged(MINIMAL, {"commonLabels": {"team": "a"}}),
        lambda o: all(made["metadata"]["labels"]["team"] == "a" for made in o),
    ),
    "digest": (
        merged(MINIMAL, {"images": {"gateway": {"digest": "sha256:" + "0" * 64}}}),
        lambda o: gateway(o)["containers"][0]["image"].endswith("/gateway@sha256:" + "0" * 64),
    ),
    "tag": (
        merged(MINIMAL, {"images": {"ray": {"tag": "v9", "pullPolicy": "Always"}}}),
        lambda o: head(o)["containers"][0]["image"].endswith("/ray:v9"),
    ),
    "pull secrets": (
        merged(MINIMAL, {"imagePullSecrets": [{"name": "registry"}]}),
        lambda o: gateway(o)["imagePullSecrets"] == head(o)["imagePullSecrets"] == [{"name": "registry"}],
    ),
    "embedded": (
        EMBEDDED,
        lambda o: (
            not of_kind(o, "RayService")
            and arguments(o)[:2] == ["trackstar", "serve"]
            and "--device=cpu" in arguments(o)
            and gateway(o)["containers"][0]["image"].startswith("ghcr.io/trackstar/ray:")
        ),
    ),
    "demo": (
        {"mode": "embedded", "demo": {"enabled": True}, "gateway": {"replicas": 1}},
        lambda o: (
            gateway(o)["initContainers"][0]["command"] == ["trackstar", "index"]
            and not of_kind(o, "CronJob")
            and volumes(gateway(o))["index"] == {"name": "index", "emptyDir": {}}
        ),
    ),
    "checkpoint, embedded": (
        merged(EMBEDDED, {"checkpoint": {"claim": "models", "path": "/models/a"}, "gateway": {"device": "cuda"}}),
        lambda o: {"--model=/models/a", "--device=cuda"} <= set(arguments(o)),
    ),
    "checkpoint": (
        merged(MINIMAL, {"checkpoint": {"claim": "models", "path": "/models/a"}}),
        lambda o: (
            application(o)["model"] == "/models/a"
            and volumes(head(o))["checkpoint"]["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
        ),
    ),
    "object store": (
        merged(
            ANYWHERE,
            {
                "index": {"location": "s3://bucket/index"},
                "objectStore": {"secret": "keys", "environment": {"AWS_REGION": "x"}},
            },
        ),
        lambda o: (
            "index" not in volumes(gateway(o))
            and gateway(o)["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
            and {"name": "AWS_REGION", "value": "x"} in head(o)["containers"][0]["env"]
        ),
    ),
    "milvus": (
        merged(MINIMAL, MILVUS),
        lambda o: (
            settings(o)["milvus"]["address"] == "milvus:19530"
            and one(o, "CronJob", "-audit")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"]
            == ["audit-milvus", "/data/index", "--config=/etc/trackstar/gateway/gateway.yaml"]
        ),
    ),
    "milvus with token and TLS": (
        merged(MINIMAL, MILVUS, {"milvus": {"tokenSecret": "token", "tls": True, "caSecret": "ca", "database": "d"}}),
        lambda o: (
            settings(o)["milvus"]
            == {
                "address": "milvus:19530",
                "database": "d",
                "collection_prefix": "trackstar_",
                "tls": True,
                "token_file": "/etc/trackstar/milvus/token",
                "ca_file": "/etc/trackstar/milvus-ca/ca.crt",
            }
        ),
    ),
    "replicas": (
        merged(MINIMAL, {"gateway": {"replicas": 5, "maxUnavailable": 2}}),
        lambda o: (
            one(o, "Deployment")["spec"]["replicas"] == 5
            and one(o, "PodDisruptionBudget", "-gateway")["spec"]["maxUnavailable"] == 2
        ),
    ),
    "no room for one more": (
        merged(MINIMAL, {"gateway": {"maxSurge": 0}}),
        lambda o: one(o, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0},
    ),
    "settings": (
        merged(MINIMAL, {"gateway": {"settings": {"admission": {"max_in_flight": 7}, "log_level": "debug"}}}),
        lambda o: (settings(o)["admission"], settings(o)["log_level"]) == ({"max_in_flight": 7}, "debug"),
    ),
    "drain": (
        merged(MINIMAL, {"gateway": {"drainSeconds": 100}}),
        lambda o: settings(o)["drain_seconds"] == 100 and gateway(o)["terminationGracePeriodSeconds"] == 115,
    ),
    "TLS": (
        merged(MINIMAL, TLS),
        lambda o: (
            settings(o)["tls"]["key"] == "/etc/trackstar/tls/tls.key"
            and "--ca-file=/etc/trackstar/tls/ca.crt" in smoke(o)["spec"]["containers"][0]["args"]
            and "appProtocol" not in one(o, "Service", "-gateway")["spec"]["ports"][0]
        ),
    ),
    "TLS on both sides": (
        merged(
            MINIMAL, TLS, {"gateway": {"tls": {"requireClientCertificate": True}}, "test": {"certificateSecret": "me"}}
        ),
        lambda o: (
            settings(o)["tls"]["require_client_certificate"]
            and volumes(smoke(o)["spec"])["client"]["secret"]["secretName"] == "me"
        ),
    ),
    "cert-manager": (
        merged(
            MINIMAL,
            TLS,
            {"gateway": {"tls": {"certManager": {"enabled": True, "issuer": {"name": "ca"}, "dnsNames": ["a.b"]}}}},
        ),
        lambda o: (
            {"a.b", "ts-trackstar-gateway.prod.svc", "ts-trackstar-gateway-headless.prod"}
            <= set(one(o, "Certificate")["spec"]["dnsNames"])
        ),
    ),
    "load balancer": (
        merged(MINIMAL, {"gateway": {"service": {"type": "LoadBalancer", "port": 443, "annotations": {"a": "b"}}}}),
        lambda o: one(o, "Service", "-gateway")["spec"]["ports"][0]["port"] == 443,
    ),
    "HPA": (
        merged(MINIMAL, {"gateway": {"autoscaling": {"kind": "hpa", "maxReplicas": 9}}}),
        lambda o: (
            one(o, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 9
            and "replicas" not in one(o, "Deployment")["spec"]
        ),
    ),
    "KEDA": (
        merged(MINIMAL, {"gateway": {"autoscaling": {"kind": "keda", "prometheusAddress": "http://p:9090"}}}),
        lambda o: (
            one(o, "ScaledObject")["spec"]["triggers"][0]["metadata"]["query"]
            == 'sum(trackstar_rpc_in_flight{namespace="prod",service="ts-trackstar-gateway-headless"})'
        ),
    ),
    "placement": (
        merged(
            MINIMAL,
            {
                "gateway": {
                    "nodeSelector": {"disk": "ssd"},
                    "tolerations": [{"operator": "Exists"}],
                    "affinity": {"nodeAffinity": {}},
                    "priorityClassName": "high",
                    "podAnnotations": {"a": "b"},
                }
            },
        ),
        lambda o: gateway(o)["nodeSelector"] == {"disk": "ssd"} and gateway(o)["priorityClassName"] == "high",
    ),
    "Ingress": (
        merged(
            MINIMAL, {"gateway": {"ingress": {"enabled": True, "host": "a.b", "className": "nginx", "tlsSecret": "t"}}}
        ),
        lambda o: one(o, "Ingress")["spec"]["tls"] == [{"hosts": ["a.b"], "secretName": "t"}],
    ),
    "route": (
        merged(MINIMAL, {"gateway": {"route": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a.b"]}}}),
        lambda o: one(o, "GRPCRoute")["spec"]["hostnames"] == ["a.b"],
    ),
    "Ray without autoscaling": (
        merged(MINIMAL, {"ray": {"autoscaling": False, "sharedMemory": "3Gi"}}),
        lambda o: (
            cluster(o)["enableInTreeAutoscaling"] is False
            and cluster(o)["workerGroupSpecs"][0]["replicas"] == 4
            and head(o)["serviceAccountName"] == "ts-trackstar-ray"
            and volumes(head(o))["shared-memory"]["emptyDir"]["sizeLimit"] == "3Gi"
        ),
    ),
    "worker groups": (
        merged(
            MINIMAL,
            {
                "serve": {
                    "workers": [
                        {
                            "name": name,
                            "minReplicas": 1,
                            "maxReplicas": 2,
                            "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
                        }
                        for name in ("a", "b")
                    ],
                    "oldClusterSeconds": 60,
                }
            },
        ),
        lambda o: (
            [group["groupName"] for group in cluster(o)["workerGroupSpecs"]] == ["a", "b"]
            and one(o, "PodDisruptionBudget", "-serve")["spec"]["minAvailable"] == 2
            and one(o, "RayService")["spec"]["rayClusterDeletionDelaySeconds"] == 60
        ),
    ),
    "gangs": (
        merged(MINIMAL, {"serve": {"application": {"gang": {"ranks": 4, "strategy": "fsdp", "gpus": 1}}}}),
        lambda o: application(o)["gang"] == {"ranks": 4, "strategy": "fsdp", "gpus": 1},
    ),
    "reindex": (
        merged(MINIMAL, {"reindex": {"enabled": True, "config": CORPUS}}),
        lambda o: (
            one(o, "RayJob")["spec"]["suspend"]
            and job(o) == {"index": "/data/index", **CORPUS}
            and cluster(o, "RayJob")["enableInTreeAutoscaling"]
            and not volumes(head(o, "RayJob"))["index"]["persistentVolumeClaim"].get("readOnly")
        ),
    ),
    "reindex at once": (
        merged(
            MINIMAL,
            {"reindex": {"enabled": True, "suspend": False, "backoffLimit": 0, "clusterSeconds": 5, "config": CORPUS}},
        ),
        lambda o: (
            one(o, "RayJob")["spec"]["suspend"] is False and one(o, "RayJob")["spec"]["ttlSecondsAfterFinished"] == 5
        ),
    ),
    "Kueue": (
        merged(MINIMAL, {"reindex": {"enabled": True, "queue": "gpus", "config": CORPUS}}),
        lambda o: (
            one(o, "RayJob")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
            and cluster(o, "RayJob")["enableInTreeAutoscaling"] is False
            and cluster(o, "RayJob")["workerGroupSpecs"][0]["replicas"] == 8
            and cluster(o)["enableInTreeAutoscaling"]
        ),
    ),
    "jobs through the gateway": (
        merged(
            MINIMAL, {"reindex": {"config": CORPUS, "throughGateway": {"enabled": True, "allowedPaths": ["/data"]}}}
        ),
        lambda o: (
            settings(o)["reindex"]["ray_address"] == "http://ts-trackstar-serve-head-svc:8265"
            and settings(o)["reindex"]["allowed_paths"] == ["/data"]
            and {"name": "index", "mountPath": "/data", "readOnly": False} in head(o)["containers"][0]["volumeMounts"]
        ),
    ),
    "no audit": (merged(MINIMAL, {"audit": {"enabled": False}}), lambda o: not of_kind(o, "CronJob")),
    "collection": (
        merged(MINIMAL, MILVUS, {"collect": {"enabled": True, "apply": True}}),
        lambda o: (
            [
                made["args"][-1]
                for made in one(o, "CronJob", "-collect")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
                    "containers"
                ]
            ]
            == ["--apply", "--apply"]
        ),
    ),
    "collection beside an object store": (
        merged(MILVUS, {"index": {"location": "s3://bucket/index"}, "collect": {"enabled": True}}),
        lambda o: (
            [
                made["args"][0]
                for made in one(o, "CronJob", "-collect")["spec"]["jobTemplate"]["spec"]["template"]["spec"][
                    "containers"
                ]
            ]
            == ["collect-milvus"]
        ),
    ),
    "tracing": (
        merged(MINIMAL, ANYWHERE, {"tracing": {"endpoint": "http://otel:4317"}}),
        lambda o: (
            settings(o)["tracing"] == {"endpoint": "http://otel:4317", "sample_ratio": 0.05}
            and application(o)["tracing_endpoint"] == "http://otel:4317"
        ),
    ),
    "workload identity": (
        merged(MINIMAL, {"serviceAccount": {"annotations": {"role": "arn"}}}),
        lambda o: all(made["metadata"]["annotations"] == {"role": "arn"} for made in of_kind(o, "ServiceAccount")),
    ),
    "no network policies": (
        merged(MINIMAL, {"networkPolicy": {"enabled": False}}),
        lambda o: not of_kind(o, "NetworkPolicy"),
    ),
    "monitoring": (
        merged(MINIMAL, {"monitoring": {"enabled": True, "labels": {"release": "p"}, "interval": "1m"}}),
        lambda o: (
            one(o, "ServiceMonitor")["metadata"]["labels"]["release"] == "p"
            and one(o, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"] == "1m"
            and one(o, "PrometheusRule")
        ),
    ),
    "monitoring without rules": (
        merged(EMBEDDED, {"monitoring": {"enabled": True, "rules": False, "dashboards": False}}),
        lambda o: not of_kind(o, "PrometheusRule") and not of_kind(o, "PodMonitor"),
    ),
    "a token for the test": (
        merged(MINIMAL, {"test": {"tokenSecret": "token", "prompt": "a", "completion": "b"}}),
        lambda o: (
            {"--plaintext-token", "--prompt=a", "--completion=b"} <= set(smoke(o)["spec"]["containers"][0]["args"])
        ),
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_switched_is_valid_and_changes_what_it_says(name: str) -> None:
    values, changes = SWITCHES[name]
    objects = render(values)
    for made in objects:
        check(made)
    assert changes(objects)


def test_long_names_stay_within_what_kubernetes_and_kuberay_take() -> None:
    objects = render(merged(MINIMAL, {"reindex": {"enabled": True, "config": CORPUS}}), release="r" * 53)
    for made in objects:
        assert len(made["metadata"]["name"]) <= (52 if made["kind"] == "CronJob" else 63)
    # MaxRayServiceNameLength and MaxRayJobNameLength of KubeRay v1.7.0.
    assert all(len(one(objects, kind)["metadata"]["name"]) <= 47 for kind in ("RayService", "RayJob"))


def test_kuberay_takes_the_job() -> None:
    """Rules of ValidateRayJobSpec and ValidateRayClusterSpec, v1.7.0: controllers/ray/utils/validation.go."""
    for name in ("cluster", "billions"):
        objects = render(preset(name))
        spec = one(objects, "RayJob")["spec"]
        assert spec["shutdownAfterJobFinishes"] or not spec["suspend"]
        assert not (spec["shutdownAfterJobFinishes"] and "deletionStrategy" in spec)
        assert spec["activeDeadlineSeconds"] > 0
        for made in (cluster(objects), cluster(objects, "RayJob")):
            # Token authentication needs a version of Ray, an autoscaler of version 2 pods that nothing restarts.
            assert made["authOptions"]["mode"] == "token"
            assert made["rayVersion"]
            for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
                assert "restartPolicy" not in group["template"]["spec"]


def test_kuberay_keeps_both_ports_of_the_serve_service() -> None:
    """BuildServeService of v1.7.0 takes the head's ports that are named `serve` or `serve-…`."""
    objects = render(MINIMAL)
    service = one(objects, "RayService")["spec"]["serveService"]["spec"]
    named = {port["name"]: port["containerPort"] for port in head(objects)["containers"][0]["ports"]}
    assert {port["name"]: port["targetPort"] for port in service["ports"]} == {
        name: port for name, port in named.items() if re.fullmatch(r"serve(-.*)?", name)
    }


def test_ray_start_takes_every_parameter() -> None:
    """KubeRay hands them on as options; those that are only known to the head must do no harm elsewhere."""
    options = {name for parameter in ray_start.params for name in parameter.opts}
    objects = render(preset("cluster"))
    for made in (cluster(objects), cluster(objects, "RayJob")):
        for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
            assert {f"--{name}" for name in group["rayStartParams"]} <= options


@pytest.mark.parametrize(
    ("quantity", "num_bytes"),
    [("2Gi", 2 << 30), ("256Mi", 256 << 20), ("1.5G", 1.5e9), (3 << 30, 3 << 30), ("16Gi", 16 << 30)],
)
def test_ray_s_objects_fit_into_shared_memory(quantity: str | int, num_bytes: float) -> None:
    # More than there is, and Ray puts them on disk.
    made = cluster(render(merged(MINIMAL, {"ray": {"sharedMemory": quantity}})))
    for group in (made["headGroupSpec"], *made["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) == pytest.approx(0.95 * num_bytes, rel=1e-6)


@pytest.mark.parametrize("values", [MINIMAL, EMBEDDED, *map(preset, NAMES)], ids=["minimal", "embedded", *NAMES])
def test_lint(values: Values) -> None:
    report = helm_python.lint(str(CHART), values=values, strict=True)
    assert report["errors"] == []
    # 1: only for information.
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_schema_is_the_one_that_is_made() -> None:
    made = json.dumps(values_schema.make(), indent=1) + "\n"
    assert values_schema.PATH.read_text(encoding="utf-8") == made, "run python -m deploy.values_schema"


def _keys(schema: Any, path: str = "") -> Iterator[str]:
    for name, part in schema.get("properties", {}).items():
        here = f"{path}.{name}".removeprefix(".")
        yield here
        # What is below these is the services' settings and has its own defaults.
        if here not in ("gateway.settings", "serve.application", "reindex.config", "global"):
            yield from _keys(part, here)


def _values(values: Values, path: str = "") -> Iterator[str]:
    for name, part in values.items():
        here = f"{path}.{name}".removeprefix(".")
        yield here
        if isinstance(part, dict) and here not in ("gateway.settings", "serve.application", "reindex.config"):
            yield from _values(part, here)


def test_every_value_is_in_the_schema_and_every_key_of_the_schema_has_a_value() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    free = re.compile(r".*\.(requests|limits)\..*|monitoring\.dashboardLabels\..*")
    values = {key for key in _values(defaults) if not free.fullmatch(key)}
    assert values == set(_keys(values_schema.make())) - {"global"}


def _uncommented(text: str) -> Iterator[str]:
    """Keys in YAML whose value stands on their line, or below as `resources`, and that have no comment above them."""
    lines = text.splitlines()
    inside = -1
    for number, line in enumerate(lines):
        found = re.match(r"^( *)(- )?([\w./-]+):(.*)$", line)
        if found is None or line.lstrip().startswith("#"):
            continue
        indent = len(found[1])
        if 0 <= inside < indent:
            continue
        inside = indent if found[3] == "resources" or found[4].strip() == "|" else -1
        above = lines[number - 1].strip() if number else ""
        if (found[4].strip() or inside >= 0) and not above.startswith("#"):
            yield f"{number + 1}: {line}"


def test_every_value_is_commented() -> None:
    assert list(_uncommented((CHART / "values.yaml").read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_say_why(path: Path) -> None:
    """A comment stands above every value, or above those that it stands together with."""
    blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
    assert blocks[0].startswith("# ")
    for block in blocks:
        bare = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
        assert block.lstrip().startswith("#") or bare[0].endswith(":"), block
        assert "# " in block, block


def test_prerequisites_are_set_by_keys_that_their_charts_have() -> None:
    """Keys of kuberay-operator's values.yaml, ray-project/kuberay v1.7.0, as far as they are used."""
    known: Values = {
        "image": {"tag"},
        "replicas": None,
        "leaderElectionEnabled": None,
        "reconcileConcurrency": None,
        "resources": {"requests", "limits"},
        "metrics": {"enabled", "serviceMonitor"},
    }
    values = yaml.safe_load((PRESETS / "kuberay-operator.yaml").read_text(encoding="utf-8"))
    assert values.keys() == known.keys()
    for key, names in known.items():
        assert names is None or values[key].keys() <= names
    assert values["image"]["tag"] == "v1.7.0"


# What is set wrongly, and the key that the refusal names.
WRONG: dict[str, tuple[Values, str]] = {
    "an unknown section": ({"gatway": {}}, "gatway"),
    "an unknown key": ({"gateway": {"replica": 1}}, "replica"),
    "an unknown key below": ({"gateway": {"tls": {"certmanager": {}}}}, "certmanager"),
    "an unknown key of an image": ({"images": {"gateway": {"version": "1"}}}, "version"),
    "a word for a number": ({"gateway": {"replicas": "two"}}, "replicas"),
    "a number for a word": ({"index": {"location": 1}}, "location"),
    "a word for yes": ({"audit": {"enabled": "yes"}}, "enabled"),
    "another mode": ({"mode": "standalone"}, "mode"),
    "no name of a claim": ({"index": {"claim": "My_Claim"}}, "claim"),
    "a digest that is none": ({"images": {"ray": {"digest": "sha256:12"}}}, "digest"),
    "an address without port": ({"milvus": {"address": "milvus"}}, "address"),
    "a credential": (
        {"objectStore": {"environment": {"AWS_SECRET_ACCESS_KEY": "hush"}}},
        "AWS_SECRET_ACCESS_KEY",
    ),
    "a settings typo": ({"gateway": {"settings": {"admission": {"max_inflight": 1}}}}, "max_inflight"),
    "a settings value": ({"gateway": {"settings": {"deadline": {"max_seconds": -1}}}}, "max_seconds"),
    "a setting of the chart's own": ({"gateway": {"settings": {"listen": {"address": "0.0.0.0:1"}}}}, "listen"),
    "an application typo": ({"serve": {"application": {"encoder": {"min_replica": 1}}}}, "min_replica"),
    "a gang of none": ({"serve": {"application": {"gang": {"ranks": 0}}}}, "ranks"),
    "the application's index": ({"serve": {"application": {"index": "/elsewhere"}}}, "index"),
    "a job typo": ({"reindex": {"config": {"worker": {}}}}, "worker"),
    "a build typo": ({"reindex": {"config": {"build": {"corpus": {"path": ["a"]}}}}}, "path"),
    "a group without resources": (
        {"serve": {"workers": [{"name": "a", "minReplicas": 1, "maxReplicas": 1}]}},
        "resources",
    ),
    "resources without limits": ({"gateway": {"resources": {"limits": None}}}, "limits"),
    "a schedule of four words": ({"audit": {"schedule": "1 2 3 4"}}, "schedule"),
    "a share above one": ({"monitoring": {"objectives": {"recall": 1.5}}}, "recall"),
    "nobody who may scrape": ({"networkPolicy": {"prometheus": []}}, "prometheus"),
    "no interval": ({"monitoring": {"interval": "15"}}, "interval"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_their_key(name: str) -> None:
    values, key = WRONG[name]
    with pytest.raises(HelmError) as caught:
        render(merged(MINIMAL, values))
    assert re.search(rf"\b{key}\b", str(caught.value)), str(caught.value)


CERTIFICATE: Values = {"certManager": {"enabled": True}}
REINDEX: Values = {"enabled": True, "config": CORPUS}
DEMO: Values = {"mode": "embedded", "demo": {"enabled": True}}

# What does not go together, and a part of the sentence that says so.
TOGETHER: list[tuple[Values, str]] = [
    (DEMO, "set gateway.replicas to 1"),
    ({"demo": {"enabled": True}, "gateway": {"replicas": 1}}, "demo.enabled needs mode: embedded"),
    (merged(DEMO, MINIMAL, {"gateway": {"replicas": 1}}), "leave index.claim empty"),
    (
        merged(DEMO, {"gateway": {"replicas": 1, "autoscaling": {"kind": "hpa"}}}),
        "leave gateway.autoscaling.kind at none",
    ),
    ({}, "name the PersistentVolumeClaim that holds it in index.claim"),
    (merged(MINIMAL, {"index": {"location": "s3://bucket/index"}}), "index.location is a URL"),
    (merged(MINIMAL, {"index": {"location": "/database"}}), "index.location /database is not below"),
    (merged(MINIMAL, {"checkpoint": {"path": "/models/a"}}), "checkpoint.path needs checkpoint.claim"),
    (merged(MINIMAL, {"gateway": {"tls": {"enabled": True}}}), "gateway.tls.enabled needs gateway.tls.secret"),
    (merged(MINIMAL, {"gateway": {"tls": CERTIFICATE}}), "certManager.enabled needs gateway.tls.enabled"),
    (merged(MINIMAL, TLS, {"gateway": {"tls": CERTIFICATE}}), "needs gateway.tls.certManager.issuer.name"),
    (
        merged(MINIMAL, {"gateway": {"tls": {"requireClientCertificate": True}}}),
        "requireClientCertificate needs gateway.tls.enabled",
    ),
    (
        merged(MINIMAL, TLS, {"gateway": {"tls": {"requireClientCertificate": True}}}),
        "needs test.certificateSecret",
    ),
    (merged(MINIMAL, {"gateway": {"autoscaling": {"kind": "keda"}}}), "needs gateway.autoscaling.prometheusAddress"),
    (merged(MINIMAL, {"gateway": {"autoscaling": {"minReplicas": 9}}}), "minReplicas is above maxReplicas"),
    (merged(MINIMAL, {"milvus": {"address": "milvus:19530"}}), "networkPolicy.egress is empty"),
    (
        merged(ANYWHERE, {"index": {"location": "s3://bucket/index"}, "collect": {"enabled": True}}),
        "collect.enabled finds nothing to do",
    ),
    (merged(EMBEDDED, MILVUS), "milvus.address needs mode: distributed"),
    (merged(MINIMAL, {"gateway": {"ingress": {"enabled": True}}}), "needs gateway.ingress.host"),
    (merged(MINIMAL, {"gateway": {"route": {"enabled": True}}}), "needs gateway.route.parentRefs"),
    (merged(EMBEDDED, {"reindex": REINDEX}), "reindex.enabled needs mode: distributed"),
    (merged(MINIMAL, {"reindex": {"enabled": True}}), "reindex needs reindex.config.build.corpus"),
    (
        merged(EMBEDDED, {"reindex": {"config": CORPUS, "throughGateway": {"enabled": True}}}),
        "reindex.throughGateway.enabled needs mode: distributed",
    ),
    (merged(MINIMAL, {"gateway": {"principalsSecret": ""}}), "gateway.principalsSecret names the Secret"),
    (merged(MINIMAL, {"ray": {"tokenSecret": ""}}), "ray.tokenSecret names the Secret"),
]


@pytest.mark.parametrize(("values", "sentence"), TOGETHER, ids=[sentence for _, sentence in TOGETHER])
def test_what_does_not_go_together_is_refused_in_a_sentence(values: Values, sentence: str) -> None:
    with pytest.raises(HelmError, match=re.escape(sentence)):
        render(values)


def test_every_refusal_has_its_case() -> None:
    text = (CHART / "templates" / "checks.yaml").read_text(encoding="utf-8")
    assert len(re.findall(r"fail ", text)) == len(TOGETHER)
