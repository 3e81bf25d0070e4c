"""What `helm test` runs, against `trackstar serve` on a real index: it says in one sentence what it found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.gateway.auth import digest_of_token
from tests.service import demo_index
from tests.service.certificates import Authority
from tests.service.serve_process import ServeProcess

_TOKEN = "a-token-of-the-test-0123456789abcdef"
_PROMPT, _COMPLETION = demo_index.QUERIES[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pod of the test has mounted."""
    folder = tmp_path_factory.mktemp("smoke")
    authority = Authority()
    for name in ("server", "client"):
        identity = authority.issue(name)
        (folder / f"{name}.crt").write_bytes(identity.certificate)
        (folder / f"{name}.key").write_bytes(identity.key)
    (folder / "ca.crt").write_bytes(authority.root)
    (folder / "token").write_text(_TOKEN + "\n")
    (folder / "principals.yaml").write_text(
        f"principals: [{{name: test, token_sha256: [{digest_of_token(_TOKEN)}]}}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[ServeProcess]:
    """A server that wants TLS on both sides and a token, and has a plain port for probes."""
    server = ServeProcess(
        demo_index.build(folder / "built"),
        folder,
        TLS__CERTIFICATE=str(folder / "server.crt"),
        TLS__KEY=str(folder / "server.key"),
        TLS__CLIENT_CA=str(folder / "ca.crt"),
        TLS__REQUIRE_CLIENT_CERTIFICATE="true",
        AUTH__PRINCIPALS_FILE=str(folder / "principals.yaml"),
    )
    yield server
    assert server.close() == 0


def _run(address: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.gateway.smoke", f"--address={address}"]
    command += [f"--prompt={_PROMPT}", f"--completion={_COMPLETION}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_gateway_that_traces(served: ServeProcess, folder: Path) -> None:
    shown = [f"--certificate={folder / 'client.crt'}", f"--key={folder / 'client.key'}"]
    found = _run(served.address, f"--token-file={folder / 'token'}", f"--ca-file={folder / 'ca.crt'}", *shown)
    assert found.returncode == 0, found.stderr
    assert f"5 proponents of {_COMPLETION!r}" in found.stdout
    assert len(found.stdout.splitlines()) == 1
    # The same without a token: healthy, but who asks may not.
    refused = _run(served.address, f"--ca-file={folder / 'ca.crt'}", *shown)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1


def test_a_gateway_that_does_not_answer(folder: Path) -> None:
    found = _run("127.0.0.1:1", "--deadline=1")
    assert found.returncode == 1
    assert "127.0.0.1:1 did not become SERVING in time; the last look said UNAVAILABLE" in found.stderr


def test_arguments_that_do_not_go_together(folder: Path) -> None:
    found = _run("127.0.0.1:1", f"--certificate={folder / 'client.crt'}")
    assert found.returncode == 1
    assert "--ca-file" in found.stderr
    found = _run("127.0.0.1:1", f"--ca-file={folder / 'absent'}")
    assert found.returncode == 1
    assert "absent" in found.stderr
