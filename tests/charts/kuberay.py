"""What the KubeRay operator makes of a Ray cluster's spec: pods, and the command that submits a job.

After ray-project/kuberay v1.7.0, `ray-operator/controllers/ray/common/pod.go` (DefaultHeadPodTemplate,
DefaultWorkerPodTemplate, BuildPod, generateRayStartCommand, setContainerEnvVars, SetContainerTokenAuthEnvVars),
`job.go` (BuildJobSubmitCommand) and `rayjob_controller.go` (configureSubmitterContainer), Apache-2.0. Only what this
chart uses: token authentication by a Secret, no autoscaler, probes of the chart's own.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from tests.charts.rendering import Object

_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_BASH = ["/bin/bash", "-c", "--"]
GCS_PORT = "6379"
NAMESPACE = "prod"


def head_service(cluster: str) -> str:
    """The name under which workers know their head."""
    return f"{cluster}-head-svc.{NAMESPACE}.svc.cluster.local"


def fields(cluster: str, group: str, pod: str) -> dict[str, str]:
    """What `fieldRef` gives to a pod."""
    return {
        "metadata.labels['ray.io/cluster']": cluster,
        "metadata.labels['ray.io/group']": group,
        "metadata.namespace": NAMESPACE,
        "metadata.name": pod,
    }


def ray_pod(spec: Object, cluster: str, kind: str, origin: str, group: int = 0) -> Object:
    """The template of a head or worker pod of a Ray cluster.

    Args:
        spec: of the RayCluster.
        cluster: its name.
        kind: head or worker.
        origin: RayService or RayJob.
        group: number of the worker group.
    """
    assert not spec["enableInTreeAutoscaling"]
    assert spec["authOptions"]["mode"] == "token"
    of_group = deepcopy(spec["headGroupSpec"] if kind == "head" else spec["workerGroupSpecs"][group])
    template: Object = of_group["template"]
    container = template["spec"]["containers"][0]
    assert container.keys().isdisjoint({"command", "args"})
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    assert "/dev/shm" in [mount["mountPath"] for mount in container["volumeMounts"]]
    service = head_service(cluster)
    parameters = {"block": "true", **of_group["rayStartParams"]}
    if kind == "worker":
        parameters.setdefault("address", f"{service}:{GCS_PORT}")
        template["spec"]["initContainers"] = [_wait(container, service, spec)]
    start = _start(kind, parameters, container["resources"])
    container["command"] = _BASH
    container["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]
    container["env"] += _token(spec)
    ip = "127.0.0.1" if kind == "head" else service
    added = {
        **({"FQ_RAY_IP": service, "RAY_IP": service.split(".")[0]} if kind == "worker" else {}),
        "KUBERAY_GEN_RAY_START_CMD": start,
        "RAY_PORT": GCS_PORT,
        "RAY_ADDRESS": f"{ip}:{GCS_PORT}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    if origin == "RayService":
        added |= {
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }
    if kind == "head":
        added["RAY_USAGE_STATS_EXTRA_TAGS"] = f"kuberay_version=v1.7.0;kuberay_crd={origin}"
    paths = {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }
    taken = {item["name"] for item in container["env"]}
    container["env"] += [{"name": name, "value": value} for name, value in added.items() if name not in taken]
    container["env"] += [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in paths.items()]
    return template


def submitter_pod(spec: Object, job: str, dashboard: str) -> Object:
    """The template of the pod that submits a RayJob (K8sJobMode).

    Args:
        spec: of the RayJob.
        job: its submission id.
        dashboard: `host:port` of the head's dashboard.
    """
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec.keys().isdisjoint({"runtimeEnvYAML", "metadata", "entrypointNumCpus", "entrypointResources"})
    template: Object = deepcopy(spec["submitterPodTemplate"])
    container = template["spec"]["containers"][0]
    assert container.keys().isdisjoint({"command", "args"})
    address = f"http://{dashboard}"
    health = (
        f"import urllib.request; r=urllib.request.urlopen('{address}/api/gcs_healthz', timeout=10); "
        "exit(0 if b'success' in r.read() else 1)"
    )
    container["command"] = ["/bin/bash", "-ce", "--"]
    container["args"] = [
        f'until python -c "{health}" >/dev/null 2>&1 ; '
        f'do echo "Waiting for Ray Dashboard GCS to become healthy at {address} ..." ; sleep 2 ; done ; '
        f"if ! ray job status --address {address} {job} >/dev/null 2>&1 ; "
        f"then ray job submit --address {address} --no-wait --submission-id {job} -- {spec['entrypoint'].strip()} ; "
        f"fi ; ray job logs --address {address} --follow {job}"
    ]
    container["env"] += [
        {"name": "PYTHONUNBUFFERED", "value": "1"},
        {"name": "RAY_DASHBOARD_ADDRESS", "value": dashboard},
        {"name": "RAY_JOB_SUBMISSION_ID", "value": job},
        *_token(spec["rayClusterSpec"]),
    ]
    return template


def _token(spec: Object) -> list[Object]:
    reference = {"secretKeyRef": {"name": spec["authOptions"]["secretName"], "key": "auth_token"}}
    return [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": reference}]


def _wait(container: Object, service: str, spec: Object) -> Object:
    check = f"ray health-check --address {service}:{GCS_PORT}"
    script = f"""
        SECONDS=0
        while true; do
            if (( SECONDS <= 120 )); then
                if {check} > /dev/null 2>&1; then
                    echo "GCS is ready."
                    break
                fi
                echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
            else
                if {check}; then
                    echo "GCS is ready. Any error messages above can be safely ignored."
                    break
                fi
                echo "$SECONDS seconds elapsed: Still waiting for GCS to be ready."
            fi
            sleep 5
        done
    """
    copied = {key: container[key] for key in ("securityContext", "volumeMounts")}
    names = [{"name": "FQ_RAY_IP", "value": service}, {"name": "RAY_IP", "value": service.split(".")[0]}]
    return {
        **deepcopy(copied),
        "name": "wait-gcs-ready",
        "command": _BASH,
        "args": [script],
        "env": [*deepcopy(container["env"]), *_token(spec), *names],
    }


def _start(kind: str, given: dict[str, str], resources: Object) -> str:
    parameters: dict[str, Any] = dict(given)
    limits, requests = resources["limits"], resources["requests"]
    if "num-cpus" not in parameters:
        parameters["num-cpus"] = str(_cores(limits.get("cpu", requests.get("cpu"))))
    if "memory" not in parameters and "memory" in limits:
        parameters["memory"] = str(int(limits["memory"][:-2]) * _UNITS[limits["memory"][-2:]])
    if "num-gpus" not in parameters and "nvidia.com/gpu" in limits:
        parameters["num-gpus"] = limits["nvidia.com/gpu"]
    flags = ""
    for option, argument in sorted(parameters.items()):
        if argument.lower() == "true":
            flags += f" --{option} "
        elif argument.lower() != "false":
            flags += f" --{option}={argument} "
    return f"ray start {'--head ' if kind == 'head' else ''}{flags}"


def _cores(quantity: str) -> int:
    # Rounded up, as Quantity.Value does.
    return -(-int(quantity[:-1]) // 1000) if quantity.endswith("m") else int(quantity)
