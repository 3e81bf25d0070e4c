"""Who may call: tokens, client certificates, nobody, and files that change."""

from __future__ import annotations

import asyncio
import io
import json
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from services.gateway.auth import ANONYMOUS, Authenticator, Credentials, digest_of_token, make_token
from services.gateway.command import hash_token
from services.gateway.config import check
from services.gateway.request import Principal
from tests.service.certificates import Authority, Identity
from tests.service.scripted import ScriptedTraceService, Served, connected, failure, sample, serving, stub_of
from trackstar.errors import InvalidRequest, NotFound, Unauthenticated
from trackstar.rpc_errors import from_call
from trackstar.v1 import trace_pb2

_TOKEN, _OTHER = "a-token-of-the-first-team", "a-token-of-another-team"


def _file(folder: Path, *principals: dict[str, Any]) -> Path:
    path = folder / "principals.yaml"
    fresh = folder / "principals.new"
    fresh.write_text(json.dumps({"principals": principals}))
    fresh.replace(path)
    return path


def _team(name: str, token: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "token_sha256": [digest_of_token(token)], **more}


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def test_tokens_over_the_wire(tmp_path: Path) -> None:
    async def run() -> None:
        path = _file(tmp_path, _team("first", _TOKEN))
        async with serving(ScriptedTraceService(), {"auth": {"principals_file": str(path)}}) as served:
            assert await _who(served, _bearer(_TOKEN)) == "first"
            wrong = [(), _bearer(_OTHER), _bearer(""), (("authorization", _TOKEN),), (("authorization", "Basic x"),)]
            for metadata in [*wrong, (*_bearer(_TOKEN), *_bearer(_TOKEN))]:
                error = await failure(served.traces.Verify(trace_pb2.VerifyRequest(), metadata=metadata))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                assert isinstance(from_call(error), Unauthenticated)
                assert _TOKEN not in str(error.details())
            assert sample(served.gateway, "trackstar_rejected_total", reason="unauthenticated") == 6

    asyncio.run(run())


def test_anonymous_calls_on_the_loopback_address_only() -> None:
    async def run() -> None:
        async with serving(ScriptedTraceService()) as served:
            assert await _who(served, ()) == "anonymous"
            # Whoever shows a token must be known by it.
            error = await failure(served.traces.Verify(trace_pb2.VerifyRequest(), metadata=_bearer(_TOKEN)))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    asyncio.run(run())
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/socket"):
        assert check({"listen": {"address": address}}).lets_anyone_in
    for address in ("0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1"):
        with pytest.raises(InvalidRequest, match="principals_file"):
            check({"listen": {"address": address}})
        with pytest.raises(InvalidRequest, match="anyone could call"):
            check({"listen": {"address": address}, "auth": {"anonymous": True, "principals_file": "p"}})
        assert not check({"listen": {"address": address}, "auth": {"principals_file": "p"}}).lets_anyone_in
    with pytest.raises(InvalidRequest, match="nobody may call"):
        check({"auth": {"anonymous": False}})


def test_the_file_is_followed_and_a_broken_change_changes_nothing(tmp_path: Path) -> None:
    path = _file(tmp_path, _team("first", _TOKEN, generations=["prod-*"], may_activate=True))
    now = [0.0]
    known = Authenticator(path, reload_seconds=5, clock=lambda: now[0])
    shown = Credentials(authorization=f"bearer {_TOKEN}")
    expected = Principal(name="first", generations=("prod-*",), may_activate=True)
    assert known.identify(shown) == expected
    _file(tmp_path, _team("second", _OTHER), _team("third", _TOKEN + "!"))
    assert known.identify(shown) == expected
    now[0] = 6
    with pytest.raises(Unauthenticated):
        known.identify(shown)
    assert known.identify(Credentials(authorization=f"Bearer {_OTHER}")).name == "second"
    for broken in ("{", "principals: [{name: x, surprise: 1}]", "[]"):
        path.write_text(broken)
        now[0] += 6
        assert known.identify(Credentials(authorization=f"Bearer {_OTHER}")).name == "second"
    path.unlink()
    now[0] += 6
    assert known.identify(Credentials(authorization=f"Bearer {_OTHER}")).name == "second"
    _file(tmp_path, _team("first", _TOKEN))
    now[0] += 6
    assert known.identify(shown).name == "first"


def test_what_is_shown_first_counts(tmp_path: Path) -> None:
    path = _file(tmp_path, _team("by-token", _TOKEN), {"name": "by-name", "certificates": ["spiffe://a/b", "common"]})
    known = Authenticator(path, anonymous=ANONYMOUS)
    names = ("127.0.0.1", "spiffe://a/b", "other")
    assert known.identify(Credentials(names=names)).name == "by-name"
    assert known.identify(Credentials(authorization=f"Bearer {_TOKEN}", names=names)).name == "by-token"
    with pytest.raises(Unauthenticated):
        known.identify(Credentials(authorization="Bearer wrong", names=names))
    assert known.identify(Credentials(names=("unknown",))) is ANONYMOUS
    # Names count only where TLS has verified them.
    plain = {"x509_common_name": [b"common"], "transport_security_type": [b"insecure"]}
    assert Credentials.of_call([], plain).names == ()
    assert Credentials.of_call([], plain | {"transport_security_type": [b"ssl"]}).names == ("common",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("principals: [{name: x, token: secret-in-plain-text}]", "Extra inputs"),
        ("principals: [{name: x, token_sha256: [secret-in-plain-text]}]", "64 hexadecimal digits"),
        ("principals: [{name: x, certificates: [a]}, {name: y, certificates: [a]}]", "share"),
        ("principals: [{name: 'a b'}]", "name"),
        ("secret-in-plain-text: [", "not YAML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "principals.yaml"
    path.write_text(content)
    with pytest.raises(InvalidRequest, match=message) as refused:
        Authenticator(path)
    assert "secret-in-plain-text" not in str(refused.value)
    with pytest.raises(NotFound):
        Authenticator(tmp_path / "missing.yaml")


def test_tokens_are_digested(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(_TOKEN + "\n"))
    hash_token()
    assert capsys.readouterr().out.strip() == digest_of_token(_TOKEN)
    hash_token(new=True)
    shown = capsys.readouterr()
    assert shown.out.strip() == digest_of_token(shown.err.removeprefix("token: ").strip())
    assert make_token() != make_token()
    for weak in ("", "short", "has a space in the middle", "ünïcödé-ünïcödé-ünï"):
        with pytest.raises(InvalidRequest):
            digest_of_token(weak)


def test_client_certificates_name_the_caller(tmp_path: Path) -> None:
    authority, stranger = Authority(), Authority()
    path = _file(
        tmp_path, {"name": "by-uri", "certificates": ["spiffe://prod/a"]}, {"name": "by-cn", "certificates": ["team-b"]}
    )
    settings = {
        "tls": {**_tls_files(tmp_path, authority.issue("server"), authority.root), "require_client_certificate": True},
        "auth": {"principals_file": str(path)},
    }

    def shown(identity: Identity | None) -> grpc.ChannelCredentials:
        if identity is None:
            return grpc.ssl_channel_credentials(authority.root)
        return grpc.ssl_channel_credentials(authority.root, identity.key, identity.certificate)

    async def run() -> None:
        by_uri = shown(authority.issue("a", uri="spiffe://prod/a"))
        async with serving(ScriptedTraceService(), settings, credentials=by_uri) as served:
            assert await _who(served, ()) == "by-uri"
            async with connected(served.address, shown(authority.issue("team-b"))) as channel:
                answer = await stub_of(channel).Verify(trace_pb2.VerifyRequest())
                assert answer.request_id == "by-cn"
            async with connected(served.address, shown(authority.issue("unknown"))) as channel:
                error = await failure(stub_of(channel).Verify(trace_pb2.VerifyRequest()))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            for refused in (None, stranger.issue("team-b")):
                async with connected(served.address, shown(refused)) as channel:
                    error = await failure(stub_of(channel).Verify(trace_pb2.VerifyRequest(), timeout=10))
                    assert error.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(run())


def test_a_renewed_certificate_is_served_to_new_connections(tmp_path: Path) -> None:
    old, new = Authority(), Authority()
    files = _tls_files(tmp_path, old.issue("old"))
    settings = {"tls": {**files, "reload_seconds": 0}}

    async def run() -> None:
        trusted = grpc.ssl_channel_credentials(old.root)
        async with serving(ScriptedTraceService(), settings, credentials=trusted) as served:
            assert await _who(served, ()) == "anonymous"
            assert await asyncio.to_thread(_common_name, served.ports.grpc) == "old"
            renewed = new.issue("new")
            # Half of a renewal: the pair does not fit, so the old one stays.
            Path(files["certificate"]).write_bytes(renewed.certificate)
            assert await asyncio.to_thread(_common_name, served.ports.grpc) == "old"
            Path(files["key"]).write_bytes(renewed.key)
            assert await asyncio.to_thread(_common_name, served.ports.grpc) == "new"
            async with connected(served.address, grpc.ssl_channel_credentials(new.root)) as channel:
                assert (await stub_of(channel).Verify(trace_pb2.VerifyRequest())).request_id == "anonymous"
            # A connection that is open keeps what it has.
            assert await _who(served, ()) == "anonymous"

    asyncio.run(run())


def test_tls_files_that_are_refused(tmp_path: Path) -> None:
    files = _tls_files(tmp_path, Authority().issue("server"))

    async def start() -> None:
        async with serving(ScriptedTraceService(), {"tls": files}):
            raise AssertionError("it must not start")

    Path(files["key"]).write_bytes(Authority().issue("other").key)
    with pytest.raises(InvalidRequest, match="TLS files"):
        asyncio.run(start())
    Path(files["key"]).unlink()
    with pytest.raises(InvalidRequest, match="TLS files"):
        asyncio.run(start())
    for half in ({"certificate": "c"}, {"certificate": "c", "key": "k", "client_ca": "a"}, {"client_ca": "a"}):
        with pytest.raises(InvalidRequest, match=r"together|needs"):
            check({"tls": half})


async def _who(served: Served, metadata: tuple[tuple[str, str], ...]) -> str:
    return (await served.traces.Verify(trace_pb2.VerifyRequest(), metadata=metadata)).request_id


def _tls_files(folder: Path, identity: Identity, client_ca: bytes | None = None) -> dict[str, str]:
    contents = {"certificate": identity.certificate, "key": identity.key, "client_ca": client_ca}
    found = {}
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.pem").write_bytes(content)
            found[name] = str(folder / f"{name}.pem")
    return found


def _common_name(port: int) -> str:
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    attribute = x509.load_pem_x509_certificate(pem.encode()).subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(attribute[0].value)
