"""The operations guide tells of commands, values, files and metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from deploy import values_schema
from tests.charts.rendering import PRESETS, ROOT, of_kind, preset, render
from trackstar import cli

GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _block(text: str, heading: str) -> str:
    """The first indented block below a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    found = re.search(r"(?:^    .*\n)+", section, re.MULTILINE)
    assert found is not None
    return found[0]


def test_commands_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {command.name or getattr(command.callback, "__name__", "") for command in cli.app.registered_commands}
    known |= {group.name or "" for group in cli.app.registered_groups} | {"jobs", "eval"}
    known |= set(project["entry-points"]["trackstar.commands"])
    called = re.findall(r"(?:\btrackstar|on_index [\w-]+) ([a-z-]+)\b", re.sub(r"trackstar (charts|-)", "", GUIDE))
    called = [name for name in called if name not in ("is", "asks")]
    assert {"audit", "delete", "plan", "trace", "fill-milvus"} <= set(called)
    assert set(called) - known == set()


def test_values_exist() -> None:
    schema = values_schema.make()
    milvus = yaml.safe_load((PRESETS / "milvus.yaml").read_text(encoding="utf-8"))
    named = [name for name in re.findall(r"`((?:[a-zA-Z]+\.)+[a-zA-Z]+)`", GUIDE) if not name.endswith(".yaml")]
    assert len(named) > 20
    for name in named:
        section, *rest = name.split(".")
        if section in milvus and section not in schema["properties"]:
            assert rest[0] in milvus[section], name
        elif section != "deadline":  # the gateway's own setting
            here = schema
            for key in (section, *rest):
                if "properties" not in here:
                    break
                assert key in here["properties"], name
                here = here["properties"][key]


def test_files_and_metrics_exist() -> None:
    for target in re.findall(r"\]\(\.\./([^)#]+)", GUIDE):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"\]\(([a-z-]+\.md)", GUIDE):
        assert (ROOT / "docs" / target).is_file(), target
    serving = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for series in re.findall(r"`(?:ray_)?(trackstar_\w+)", GUIDE):
        assert series in serving, series


def test_an_empty_cluster_traces_after_five_commands() -> None:
    commands = _block(README, "On Kubernetes")
    assert commands == _block(GUIDE, "From an empty cluster to a trace")
    lines = [line for line in commands.replace("\\\n", "").splitlines() if line.strip()]
    assert len(lines) == 5
    assert not any("&&" in line or ";" in line for line in lines)
    # The names in them are those that the preset asks for.
    values = preset("laptop")
    assert f"secret generic {values['test']['tokenSecret']} --from-file=token" in commands
    objects = render(values, release="trackstar", namespace="default")
    services = [made["metadata"]["name"] for made in of_kind(objects, "Service")]
    assert re.findall(r"service/(\S+)", commands) == [services[0]]


def test_a_command_on_the_index_is_a_pod_like_the_audits() -> None:
    """The filter of `on_index`, on the CronJob as it is rendered."""
    jq = shutil.which("jq")
    if jq is None:
        pytest.skip("jq is not installed")
    (filter_,) = re.findall(r"jq '(.*?)' --args --", GUIDE)
    cron = of_kind(render(preset("cluster"), release="trackstar"), "CronJob", "trackstar-audit")[0]
    words = ["collect", "/data/index", "--apply"]
    found = subprocess.run(
        [jq, filter_, "--args", "--", *words],
        input=json.dumps({"spec": cron["spec"]["jobTemplate"]["spec"]}),
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    (container,) = yaml.safe_load(found.stdout)["spec"]["template"]["spec"]["containers"]
    assert [*container["command"], *container["args"]] == ["trackstar", *words]
