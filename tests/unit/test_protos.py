"""The contract: linted, formatted, unbroken, and the committed stubs are what it generates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_PROTOS = _ROOT / "protos"
_BUF = Path(sys.executable).with_name("buf")


@pytest.mark.parametrize(
    "arguments", [["lint"], ["format", "--diff", "--exit-code"], ["breaking", "--against", "v1.binpb"]]
)
def test_buf_finds_nothing(arguments: list[str]) -> None:
    found = subprocess.run([_BUF, *arguments], cwd=_PROTOS, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_removed_field_is_seen_as_breaking(tmp_path: Path) -> None:
    for file in [*_PROTOS.rglob("*.proto"), _PROTOS / "buf.yaml", _PROTOS / "v1.binpb"]:
        copy = tmp_path / file.relative_to(_PROTOS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    trace = tmp_path / "trackstar/v1/trace.proto"
    trace.write_text(trace.read_text().replace("  string page_token = 12;\n", ""))
    found = subprocess.run([_BUF, "breaking", "--against", "v1.binpb"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode != 0
    assert "page_token" in found.stdout


def test_committed_stubs_are_those_of_the_protos(tmp_path: Path) -> None:
    protos = sorted(_PROTOS.rglob("*.proto"))
    outputs = ["--python_out", "--grpc_python_out", "--mypy_out=quiet", "--mypy_grpc_out=quiet"]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{_PROTOS}"]
    command += [f"{option}:{tmp_path}" if "=" in option else f"{option}={tmp_path}" for option in outputs]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run([*command, *map(str, protos)], check=True, env=environment)
    made = {file.relative_to(tmp_path): file.read_text() for file in tmp_path.rglob("*") if file.is_file()}
    kept = {file.relative_to(_ROOT): file.read_text() for file in (_ROOT / "trackstar/v1").glob("*_pb2*")}
    assert made.keys() == kept.keys()
    assert made == kept
