"""The images' file: Hadolint finds nothing, and what the chart expects of the images is in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.charts.rendering import ROOT, gateway_pod, preset, render

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def _hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    program = shutil.which("hadolint", path=beside)
    assert program is not None, "hadolint is missing; make the environment again (make env)"
    return subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True, timeout=120)


def _stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Base and instructions of every stage; `` holds what stands before the first."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {"": ("", [])}
    name = ""
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        else:
            found[name][1].append((instruction, rest.strip()))
    return found


def _all_of(name: str) -> list[tuple[str, str]]:
    """Instructions that make an image, of the stages below it too."""
    stages = _stages()
    if name not in stages:
        return []
    base, mine = stages[name]
    return [*_all_of(base), *mine]


def test_hadolint_finds_nothing_and_would_find_something(tmp_path: Path) -> None:
    found = _hadolint(DOCKERFILE)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "hadolint ignore" not in DOCKERFILE.read_text(encoding="utf-8")
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nCMD sleep 1\n")
    assert {"DL3007", "DL3025"} <= set(re.findall(r"DL\d{4}", _hadolint(tmp_path / "Dockerfile").stdout))


def test_the_base_must_be_given_and_there_is_no_other() -> None:
    stages = _stages()
    assert stages[""][1] == [("ARG", "PYTHON")]
    assert {base for base, _ in stages.values()} - stages.keys() == {"${PYTHON}"}


@pytest.mark.parametrize("image", ["gateway", "ray"])
def test_an_image_runs_without_rights_and_has_no_tools(image: str) -> None:
    instructions = _all_of(image)
    assert [rest for instruction, rest in instructions if instruction == "USER"] == ["10001:10001"]
    spec = gateway_pod(render(preset("laptop")))["spec"]["securityContext"]
    assert f"{spec['runAsUser']}:{spec['runAsGroup']}" == "10001:10001"
    assert ("ENTRYPOINT", '["trackstar"]') in instructions
    for instruction, rest in instructions:
        assert instruction != "ADD"
        if instruction in ("CMD", "ENTRYPOINT"):
            assert rest.startswith("["), "a shell would not hand signals on"
        # Only the user is made there; nothing is installed, so there is no compiler and no pip cache.
        if instruction == "RUN":
            assert rest.startswith("groupadd ")
            assert not re.search(r"\b(apt|apt-get|apk|pip)\b", rest)


def test_the_gateway_has_no_torch_and_ray_has_everything() -> None:
    extras = {
        name: set(re.findall(r"'\.\[(.*?)\]'", " ".join(rest for _, rest in _all_of(f"build-{name}")))[0].split(","))
        for name in ("gateway", "ray")
    }
    assert extras == {"gateway": {"gateway", "s3"}, "ray": {"encoder", "index", "s3", "gateway", "ray"}}
    pinned = re.findall(r'"(torch==[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pinned) == {"torch==2.13.0"}
    assert any(f" {pinned[0]} " in rest for _, rest in _all_of("build-ray"))
    assert not any("torch==" in rest for _, rest in _all_of("build-gateway"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    for _, instructions in _stages().values():
        for instruction, rest in instructions:
            if instruction == "COPY" and not rest.startswith("--from="):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert source in let_through, source


def test_the_demo_is_where_the_chart_looks_for_it() -> None:
    (copied,) = [rest.split() for _, rest in _stages()["ray"][1] if rest.startswith("examples")]
    assert copied == ["examples/demo", "/opt/trackstar/examples/demo"]
    begin = gateway_pod(render(preset("laptop")))["spec"]["initContainers"][0]
    files = [Path(argument.partition("=")[2] or argument) for argument in begin["args"] if copied[1] in argument]
    assert len(files) == 3
    for file in files:
        assert (ROOT / "examples" / "demo" / file.relative_to(copied[1])).exists()
