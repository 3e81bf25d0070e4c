"""What holds for every object of every preset: least privilege, default deny, references and selectors that meet.

The chart's settings are held against the classes that read them, its arguments against the commands they are given to.
"""

from __future__ import annotations

import importlib
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import TypeAdapter

from services.gateway import config as gateway_config
from services.gateway import smoke
from services.reindex import config as reindex_config
from services.serve.config import SERVICER_FUNCTIONS, ServeConfig
from tests.charts.rendering import (
    CHART,
    NAMES,
    ROOT,
    Object,
    Values,
    merged,
    of_kind,
    one,
    pod_templates,
    preset,
    render,
)
from trackstar import cli

# The preset with everything, and what it leaves out.
EVERYTHING: Values = merged(
    preset("cluster"),
    {
        "networkPolicy": {"egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]},
        "milvus": {"address": "milvus:19530", "tokenSecret": "milvus", "tls": True, "caSecret": "milvus-ca"},
        "objectStore": {"secret": "store", "environment": {"AWS_REGION": "x"}},
        "tracing": {"endpoint": "http://otel:4317"},
        "gateway": {
            "tls": {"requireClientCertificate": True},
            "ingress": {"enabled": True, "host": "a.b", "tlsSecret": "host"},
            "route": {"enabled": True, "parentRefs": [{"name": "g"}]},
        },
        "reindex": {"throughGateway": {"enabled": True, "allowedPaths": ["/data"]}},
        "imagePullSecrets": [{"name": "registry"}],
        "test": {"certificateSecret": "me"},
    },
)
CASES: dict[str, Values] = {
    **{name: preset(name) for name in NAMES},
    "everything": EVERYTHING,
    "hpa": merged(EVERYTHING, {"gateway": {"autoscaling": {"kind": "hpa"}}, "ray": {"autoscaling": False}}),
}
DEFAULTS: Values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))

every_case = pytest.mark.parametrize("case", CASES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """Pods of one template. `owner`: the object it stands in; `ray`: start parameters, in a Ray cluster."""

    owner: Object
    labels: dict[str, str]
    spec: dict[str, Any]
    ray: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """What a failure calls them."""
        return f"{self.owner['kind']} {self.owner['metadata']['name']}: {self.spec['containers'][0]['name']}"

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All containers, those of the beginning too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def runs_on(self) -> bool:
        """Whether they run until they are ended."""
        return self.owner["kind"] == "Deployment" or self.ray is not None

    @property
    def scales(self) -> bool:
        """Whether Ray's autoscaler stands beside the head."""
        is_head = self.spec["containers"][0]["name"] == "ray-head"
        return is_head and bool(clusters([self.owner])[0]["enableInTreeAutoscaling"])


def clusters(objects: list[Object]) -> list[dict[str, Any]]:
    """Specs of all Ray clusters."""
    services = [made["spec"]["rayClusterConfig"] for made in of_kind(objects, "RayService")]
    return services + [made["spec"]["rayClusterSpec"] for made in of_kind(objects, "RayJob")]


def pods(objects: list[Object]) -> list[Pods]:
    """All pods of a rendering."""
    found = []
    for made in objects:
        groups = [group for spec in clusters([made]) for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
        parameters = {id(group["template"]): group["rayStartParams"] for group in groups}
        found += [
            Pods(
                owner=made,
                labels=template["metadata"]["labels"],
                spec=template["spec"],
                ray=parameters.get(id(template)),
            )
            for template in pod_templates(made)
        ]
    return found


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector takes an object with these labels."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def ports(rules: list[dict[str, Any]]) -> set[int]:
    """All ports that rules of a policy name."""
    return {
        number
        for rule in rules
        for port in rule.get("ports", [])
        for number in range(port["port"], port.get("endPort", port["port"]) + 1)
    }


@every_case
def test_pods_may_do_nothing_that_they_need_not(case: str) -> None:
    objects = render(CASES[case])
    for found in pods(objects):
        security = found.spec["securityContext"]
        assert security["runAsNonRoot"] is True, found.name
        assert security["runAsUser"] == security["runAsGroup"] == 10001, found.name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, found.name
        assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & found.spec.keys(), found.name
        assert not [volume for volume in found.spec["volumes"] if "hostPath" in volume], found.name
        for container in found.containers:
            check_container(container, found.name)
            assert all("hostPort" not in port for port in container.get("ports", []))
    for cluster in clusters(objects):
        if cluster["enableInTreeAutoscaling"]:
            check_container(cluster["autoscalerOptions"], "autoscaler")


def check_container(container: dict[str, Any], name: str) -> None:
    """Security and resources of a container."""
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }, name
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}, name
    assert "memory" in container["resources"]["limits"], name
    assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]], name


@every_case
def test_only_rays_autoscaler_gets_a_token_of_the_api(case: str) -> None:
    objects = render(CASES[case])
    for found in pods(objects):
        if found.scales:
            # KubeRay gives the head an account of its own, with the rights to scale that cluster.
            assert "serviceAccountName" not in found.spec
        else:
            assert found.spec["automountServiceAccountToken"] is False, found.name
            one(objects, "ServiceAccount", found.spec["serviceAccountName"])
    assert all(made["automountServiceAccountToken"] is False for made in of_kind(objects, "ServiceAccount"))
    assert not [made for made in objects if "Role" in made["kind"]]


def texts(part: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text below, with the key it stands at."""
    if isinstance(part, dict):
        for name, value in part.items():
            yield from texts(value, str(name))
    elif isinstance(part, list):
        for value in part:
            yield from texts(value, key)
    elif isinstance(part, str):
        yield key, part


@every_case
def test_secrets_are_referred_to_and_never_written(case: str) -> None:
    objects = render(CASES[case])
    secret = re.compile(r"(?i)(token|password|secret|access_?key|private_?key)")
    assert not of_kind(objects, "Secret")
    for found in pods(objects):
        for variable in (variable for container in found.containers for variable in container["env"]):
            assert not secret.search(variable["name"]), variable
    for made in of_kind(objects, "ConfigMap"):
        for file, text in made["data"].items():
            if not file.endswith(".yaml"):
                continue
            for key, value in texts(yaml.safe_load(text)):
                # Files of secrets are named by their paths.
                assert not secret.search(key) or value.startswith("/etc/trackstar/"), (file, key)
                assert not re.search(r"[A-Za-z0-9+=_-]{40,}", value), (file, key)


@every_case
def test_nothing_comes_in_but_to_ports_that_are_named(case: str) -> None:
    objects = render(CASES[case])
    policies = of_kind(objects, "NetworkPolicy")
    deny = one(objects, "NetworkPolicy", "-deny")["spec"]
    assert deny.keys() == {"podSelector", "policyTypes"}
    assert deny["policyTypes"] == ["Ingress", "Egress"]
    for found in pods(objects):
        assert selects(deny["podSelector"], found.labels), found.name
        mine = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], found.labels)]
        let_in = {number for policy in mine for number in ports(policy.get("ingress", []))}
        listening = {
            port["containerPort"] for container in found.spec["containers"] for port in container.get("ports", [])
        }
        probed = {
            port["containerPort"]
            for container in found.spec["containers"]
            for port in container.get("ports", [])
            if port["name"] == "health"
        }
        # The kubelet is on the node; nobody else is to ask there.
        assert listening - probed <= let_in, found.name
        assert not probed & let_in, found.name
        if found.ray is not None:
            fixed = {int(value) for name, value in found.ray.items() if name.endswith("-port")}
            assert fixed <= let_in, found.name
            workers = range(int(found.ray["min-worker-port"]), int(found.ray["max-worker-port"]) + 1)
            assert set(workers) <= let_in, found.name
    # What a policy lets in or out is somewhere.
    labels = [found.labels for found in pods(objects)]
    for policy in policies:
        spec = policy["spec"]
        assert any(selects(spec["podSelector"], of) for of in labels), policy["metadata"]["name"]
        for rule in (*spec.get("ingress", []), *spec.get("egress", [])):
            assert rule.get("from") or rule.get("to")
            for peer in (*rule.get("from", []), *rule.get("to", [])):
                if peer.keys() == {"podSelector"}:
                    assert any(selects(peer["podSelector"], of) for of in labels), policy["metadata"]["name"]


@every_case
def test_what_is_sent_inside_is_let_out_and_in(case: str) -> None:
    """For each connection between pods: a rule of the one who sends, and one of the one who is sent to."""
    objects = render(CASES[case])
    by_component = {found.labels["app.kubernetes.io/component"]: found.labels for found in pods(objects)}
    expected = [("test", "gateway", 50051)]
    if "serve" in by_component:
        expected += [("gateway", "serve", 9000), ("serve", "serve", 6379), ("serve", "serve", 10100)]
        if CASES[case].get("reindex", {}).get("throughGateway"):
            expected += [("gateway", "serve", 8265)]
    if "reindex" in by_component:
        # Its submitter asks the dashboard.
        expected += [("reindex", "reindex", 8265), ("reindex", "reindex", 10001)]
    policies = [policy["spec"] for policy in of_kind(objects, "NetworkPolicy")]
    for sender, receiver, port in expected:
        for mine, theirs, rules, side in (
            (by_component[sender], by_component[receiver], "egress", "to"),
            (by_component[receiver], by_component[sender], "ingress", "from"),
        ):
            assert any(
                port in ports([rule])
                and any("podSelector" in peer and selects(peer["podSelector"], theirs) for peer in rule[side])
                for policy in policies
                if selects(policy["podSelector"], mine)
                for rule in policy.get(rules, [])
            ), (sender, receiver, port, rules)


@every_case
def test_services_and_selectors_meet_what_they_are_for(case: str) -> None:
    objects = render(CASES[case])
    all_pods = pods(objects)
    services = of_kind(objects, "Service")
    for service in services:
        matched = [found for found in all_pods if selects({"matchLabels": service["spec"]["selector"]}, found.labels)]
        assert matched, service["metadata"]["name"]
        for found in matched:
            named = [port for container in found.spec["containers"] for port in container["ports"]]
            targets = {port["targetPort"] for port in service["spec"]["ports"]}
            assert targets <= {port["name"] for port in named}, found.name
    deployment = one(objects, "Deployment")
    assert selects(deployment["spec"]["selector"], deployment["spec"]["template"]["metadata"]["labels"])
    for found in all_pods:
        for constraint in found.spec.get("topologySpreadConstraints", []):
            assert selects(constraint["labelSelector"], found.labels), found.name
    for budget in of_kind(objects, "PodDisruptionBudget"):
        assert any(selects(budget["spec"]["selector"], found.labels) for found in all_pods)
    for scaler in (*of_kind(objects, "HorizontalPodAutoscaler"), *of_kind(objects, "ScaledObject")):
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    for monitor in of_kind(objects, "ServiceMonitor"):
        scraped = [made for made in services if selects(monitor["spec"]["selector"], made["metadata"]["labels"])]
        for endpoint in monitor["spec"]["endpoints"]:
            # Of one Service: of two, every sample would be counted twice.
            (_,) = [made for made in scraped if endpoint["port"] in [port["name"] for port in made["spec"]["ports"]]]
    for monitor in of_kind(objects, "PodMonitor"):
        watched = [found for found in all_pods if selects(monitor["spec"]["selector"], found.labels)]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            scraped_pods = [
                found
                for found in watched
                if endpoint["port"] in [port["name"] for port in found.spec["containers"][0].get("ports", [])]
            ]
            assert {found.name for found in scraped_pods} == {found.name for found in all_pods if found.ray is not None}
    backends = [
        path["backend"]["service"]["name"]
        for made in of_kind(objects, "Ingress")
        for rule in made["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    backends += [
        backend["name"]
        for made in of_kind(objects, "GRPCRoute")
        for rule in made["spec"]["rules"]
        for backend in rule["backendRefs"]
    ]
    assert set(backends) <= {made["metadata"]["name"] for made in services}


@every_case
def test_every_reference_is_rendered_or_the_users(case: str) -> None:
    objects = render(CASES[case])
    rendered = {(made["kind"], made["metadata"]["name"]) for made in objects}
    given = {text for _, text in texts(merged(DEFAULTS, CASES[case]))}
    for found in pods(objects):
        named = {mount["name"] for container in found.containers for mount in container["volumeMounts"]}
        assert named == {volume["name"] for volume in found.spec["volumes"]} | ({"tmp"} & named), found.name
        references = [
            reference
            for volume in found.spec["volumes"]
            for reference in (
                ("ConfigMap", volume.get("configMap", {}).get("name")),
                ("Secret", volume.get("secret", {}).get("secretName")),
                ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
            )
            if reference[1]
        ]
        references += [
            ("Secret", source["secretRef"]["name"])
            for container in found.containers
            for source in container.get("envFrom", [])
        ]
        references += [("Secret", secret["name"]) for secret in found.spec.get("imagePullSecrets", [])]
        for kind, name in references:
            assert (kind, name) in rendered or name in given, (found.name, kind, name)
    for cluster in clusters(objects):
        assert cluster["authOptions"]["secretName"] in given


@every_case
def test_images_are_pinned(case: str) -> None:
    for found in pods(render(CASES[case])):
        for container in found.containers:
            name, _, tag = container["image"].partition("@")[0].rpartition(":")
            assert name, container["image"]
            assert tag not in ("", "latest"), container["image"]


@every_case
def test_what_runs_on_is_probed_spread_and_given_time_to_end(case: str) -> None:
    objects = render(CASES[case])
    settings = yaml.safe_load(one(objects, "ConfigMap", "-gateway")["data"]["gateway.yaml"])
    for found in pods(objects):
        if not found.runs_on:
            assert found.spec.get("restartPolicy") == "Never", found.name
            continue
        assert found.spec["topologySpreadConstraints"], found.name
        for container in found.spec["containers"]:
            assert container.keys() >= {"livenessProbe", "readinessProbe"}, found.name
            listening = {port["containerPort"] for port in container["ports"]}
            for probe in (container[name] for name in container if name.endswith("Probe")):
                assert (probe.get("grpc") or probe["httpGet"])["port"] in listening, found.name
        if found.owner["kind"] == "Deployment":
            # A second each for what is written and not yet sent, and the connections that are left.
            notice = settings.get("notice_seconds", gateway_config.GatewayConfig().notice_seconds)
            assert found.spec["terminationGracePeriodSeconds"] > settings["drain_seconds"] + notice + 5
            probes = found.spec["containers"][0]
            port = int(settings["listen"]["health_address"].rpartition(":")[2])
            assert {probes[name]["grpc"]["port"] for name in probes if name.endswith("Probe")} == {port}


@every_case
def test_settings_are_taken_by_the_code_that_reads_them(case: str, tmp_path: Path) -> None:
    objects = render(CASES[case])
    files = one(objects, "ConfigMap", "-gateway")["data"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    loaded = gateway_config.load(tmp_path / "gateway.yaml", {})
    assert not loaded.lets_anyone_in
    if loaded.reindex.config_file is not None:
        assert loaded.reindex.config_file.name in files
        reindex_config.load(tmp_path / "reindex.yaml")
    for made in of_kind(objects, "RayService"):
        serve = yaml.safe_load(made["spec"]["serveConfigV2"])
        (application,) = serve["applications"]
        TypeAdapter(ServeConfig).validate_python(application["args"])
        assert serve["grpc_options"]["grpc_servicer_functions"] == SERVICER_FUNCTIONS
        module, _, attribute = application["import_path"].partition(":")
        assert f"def {attribute}(" in (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        assert loaded.backends.application == application["name"]
        assert loaded.backends.encoder_address == f"{made['spec']['serveService']['metadata']['name']}:9000"
    for made in of_kind(objects, "ConfigMap", "-reindex"):
        job = reindex_config.make(yaml.safe_load(made["data"]["job.yaml"]))
        assert job.milvus == loaded.milvus


def _command(name: str) -> Callable[..., Any]:
    """What `trackstar NAME` calls: of the library, or of the services by the entry points in pyproject.toml."""
    for known in cli.app.registered_commands:
        if known.callback is not None and (known.name or known.callback.__name__.replace("_", "-")) == name:
            return known.callback
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, attribute = project["entry-points"]["trackstar.commands"][name].partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _parse(function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """Arguments as a command gets them; unknown ones end the test."""
    app = typer.Typer()
    app.command()(function)
    found: dict[str, Any] = typer.main.get_command(app).make_context("command", list(arguments)).params
    return found


@every_case
def test_arguments_are_taken_by_the_commands_they_are_given_to(case: str) -> None:
    objects = render(CASES[case])
    seen = set()
    for found in pods(objects):
        mounts = [mount["mountPath"] for container in found.containers for mount in container["volumeMounts"]]
        for container in (container for container in found.containers if found.ray is None and "command" in container):
            command = [*container["command"], *container["args"]]
            if command[0] == "trackstar":
                parameters = _parse(_command(command[1]), command[2:])
            else:
                assert command[:3] == ["python", "-m", smoke.__name__]
                parameters = _parse(smoke.main, command[3:])
            seen.add(command[1])
            for value in parameters.values():
                # A file of ours is below something that is mounted.
                if isinstance(value, Path) and value.is_relative_to("/etc/trackstar"):
                    assert any(value.is_relative_to(mount) for mount in mounts), (found.name, value)
    assert "-m" in seen
