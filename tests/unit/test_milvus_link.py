"""The link to Milvus against a gRPC server that answers as told: which failures are retried, how often, until when."""

from __future__ import annotations

import base64
import datetime
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from trackstar.breaker import CircuitBreaker, CircuitOpen
from trackstar.errors import Incompatible, InvalidRequest, NotFound, NotReady, Overloaded, StorageFull, TrackstarError
from trackstar.milvus_link import MilvusAccess, MilvusLink, NoSuchIndex, NotLoaded, RetryPolicy

POLICY = RetryPolicy(timeout_seconds=30, max_attempts=3)
Answer = Callable[[Any], Any]


class Scripted(milvus_pb2_grpc.MilvusServiceServicer):  # type: ignore[misc]
    """Answers GetVersion by what is next in its script, the last for ever."""

    def __init__(self) -> None:
        self.script: list[Answer] = [version]
        self.metadata: list[dict[str, str]] = []

    def GetVersion(self, request: Any, context: Any) -> Any:
        self.metadata.append(dict(context.invocation_metadata()))
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return answer(context)


def version(_: Any) -> Any:
    return milvus_pb2.GetVersionResponse(version="v1")


def status(code: int, reason: str = "", **fields: Any) -> Answer:
    refusal = common_pb2.Status(code=code, reason=reason, **fields)
    return lambda _: milvus_pb2.GetVersionResponse(status=refusal)


def abort(code: grpc.StatusCode) -> Answer:
    return lambda context: context.abort(code, "said so")


@contextmanager
def serving(servicer: Scripted, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        milvus_pb2_grpc.add_MilvusServiceServicer_to_server(servicer, server)
        address = "127.0.0.1:0"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()


@pytest.fixture
def server() -> Iterator[tuple[Scripted, str]]:
    servicer = Scripted()
    with serving(servicer) as address:
        yield servicer, address


class Time:
    """A clock that only pauses move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def link_to(address: str, time: Time, *, policy: RetryPolicy = POLICY, threshold: int = 100) -> MilvusLink:
    breaker = CircuitBreaker("Milvus", failure_threshold=threshold, reset_seconds=5, clock=time)
    return MilvusLink(
        MilvusAccess(address=address), policy=policy, breaker=breaker, clock=time, sleep=time.sleep, random=lambda: 0.5
    )


def ask(link: MilvusLink, *, patient: bool = False, timeout_seconds: float | None = None) -> str:
    deadline = link.deadline(timeout_seconds)
    return str(link.call("GetVersion", milvus_pb2.GetVersionRequest(), deadline, patient=patient).version)


@pytest.mark.parametrize(
    "failure",
    [
        abort(grpc.StatusCode.UNAVAILABLE),
        abort(grpc.StatusCode.UNKNOWN),
        abort(grpc.StatusCode.RESOURCE_EXHAUSTED),
        status(1, "service not ready"),
        status(8, "rate limit exceeded"),
        status(503, "channel not available"),
        status(1, "proxy TaskCondition context Done"),
        status(2000, "new in some version", retriable=True),
        status(65535, "node not match[expectedNodeID=2][actualNodeID=3]"),
        status(0, "rate", error_code=common_pb2.RateLimit),
    ],
)
def test_what_may_pass_is_tried_again(server: tuple[Scripted, str], failure: Answer) -> None:
    servicer, address = server
    servicer.script = [failure, failure, version]
    time = Time()
    with link_to(address, time) as link:
        assert ask(link) == "v1"
    assert time.pauses == pytest.approx([0.05 * 0.75, 0.1 * 0.75])


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (abort(grpc.StatusCode.UNAUTHENTICATED), NotReady),
        (abort(grpc.StatusCode.PERMISSION_DENIED), NotReady),
        (abort(grpc.StatusCode.UNIMPLEMENTED), Incompatible),
        (status(100, "collection not found"), NotFound),
        (status(101, "collection not loaded"), NotLoaded),
        (status(700, "index not found"), NoSuchIndex),
        (status(7, "disk quota exceeded"), StorageFull),
        (status(1100, "invalid dimension"), Incompatible),
        (status(65535, "invalid dimension: 32776"), Incompatible),
    ],
)
def test_what_stays_is_told_at_once(server: tuple[Scripted, str], failure: Answer, error: type[TrackstarError]) -> None:
    servicer, address = server
    servicer.script = [failure, version]
    time = Time()
    with link_to(address, time) as link, pytest.raises(error) as caught:
        ask(link, patient=True)
    assert address in str(caught.value)
    assert time.pauses == []


@pytest.mark.parametrize(
    ("failure", "error"),
    [(abort(grpc.StatusCode.UNAVAILABLE), NotReady), (status(8, "rate limit exceeded"), Overloaded)],
)
def test_attempts_are_numbered_unless_nobody_waits(
    server: tuple[Scripted, str], failure: Answer, error: type[TrackstarError]
) -> None:
    servicer, address = server
    servicer.script = [*[failure] * 9, version]
    time = Time()
    with link_to(address, time) as link:
        with pytest.raises(error, match=r"said so|rate limit"):
            ask(link)
        assert len(time.pauses) == POLICY.max_attempts - 1
        assert ask(link, patient=True) == "v1"
    assert max(time.pauses) <= POLICY.max_pause_seconds


@pytest.mark.parametrize("patient", [False, True])
def test_a_server_that_starts_is_asked_until_the_deadline_and_not_beyond(
    server: tuple[Scripted, str], patient: bool
) -> None:
    servicer, address = server
    servicer.script = [status(1, "service not ready")]
    time = Time()
    with link_to(address, time) as link, pytest.raises(NotReady, match="service not ready"):
        ask(link, patient=patient, timeout_seconds=7)
    assert 5.5 < time.now < 7
    assert len(time.pauses) > POLICY.max_attempts


def test_an_open_breaker_refuses_the_hasty_and_holds_up_the_patient(server: tuple[Scripted, str]) -> None:
    servicer, address = server
    servicer.script = [*[abort(grpc.StatusCode.UNAVAILABLE)] * 2, version]
    time = Time()
    with link_to(address, time, threshold=2) as link:
        with pytest.raises(CircuitOpen, match="tried again in"):
            ask(link)
        asked = len(servicer.metadata)
        with pytest.raises(CircuitOpen):
            ask(link)
        assert len(servicer.metadata) == asked == 2
        assert ask(link, patient=True) == "v1"
        assert time.now > 5
        assert link.breaker.state == "closed"


def test_refusals_do_not_open_the_breaker(server: tuple[Scripted, str]) -> None:
    servicer, address = server
    servicer.script = [status(1100, "no")]
    with link_to(address, Time(), threshold=2) as link:
        for _ in range(5):
            with pytest.raises(Incompatible):
                ask(link)
        assert link.breaker.state == "closed"


def test_a_hang_ends_at_the_deadline_and_counts_if_there_was_time(server: tuple[Scripted, str]) -> None:
    servicer, address = server
    released = threading.Event()

    def hang(context: Any) -> Any:
        released.wait(30)
        return version(context)

    servicer.script = [hang]
    access = MilvusAccess(address=address)
    try:
        for seconds, state in ((0.2, "closed"), (1.2, "open")):
            breaker = CircuitBreaker("Milvus", failure_threshold=1)
            with (
                MilvusLink(access, breaker=breaker) as link,
                pytest.raises(NotReady, match="did not answer GetVersion within"),
            ):
                ask(link, timeout_seconds=seconds)
            assert breaker.state == state
    finally:
        released.set()


def test_retries_are_told_of(server: tuple[Scripted, str]) -> None:
    servicer, address = server
    servicer.script = [abort(grpc.StatusCode.UNAVAILABLE), status(1, "not ready"), status(8), version]
    seen: list[tuple[str, str]] = []
    access = MilvusAccess(address=address)
    with MilvusLink(access, on_retry=lambda *what: seen.append(what), sleep=lambda _: None) as link:
        assert ask(link) == "v1"
    assert seen == [("GetVersion", reason) for reason in ("unavailable", "not_ready", "overloaded")]


def test_credentials_go_along_and_are_not_shown(server: tuple[Scripted, str]) -> None:
    servicer, address = server
    servicer.script = [abort(grpc.StatusCode.UNAUTHENTICATED)]
    plain = MilvusAccess(address=address)
    cases = [
        (replace(plain, user="ann", password="s3cret"), {"authorization": "ann:s3cret"}),
        (replace(plain, token="s3cret", database="mine"), {"authorization": "s3cret", "dbname": "mine"}),
        (plain, {}),
    ]
    for access, expected in cases:
        with MilvusLink(access) as link:
            with pytest.raises(NotReady) as caught:
                link.version()
            assert "s3cret" not in str(caught.value) + repr(access) + repr(link)
        sent = servicer.metadata[-1]
        if "authorization" in sent:
            sent["authorization"] = base64.b64decode(sent["authorization"]).decode()
        assert {key: sent[key] for key in ("authorization", "dbname") if key in sent} == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"address": "http://ann:s3cret@milvus:19530"},
        {"address": "milvus"},
        {"user": "ann"},
        {"password": "s3cret"},
        {"user": "ann", "password": "s3cret", "token": "s3cret"},
        {"ca_file": Path("ca.pem")},
        {"tls": True, "cert_file": Path("cert.pem")},
    ],
)
def test_access_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        MilvusAccess(**{"address": "milvus:19530", **fields})
    assert "s3cret" not in str(caught.value)


def test_a_closed_link_refuses(server: tuple[Scripted, str]) -> None:
    link = MilvusLink(MilvusAccess(address=server[1]))
    assert link.version() == "v1"
    link.close()
    link.close()
    with pytest.raises(InvalidRequest, match="closed"):
        link.version()


def test_tls_checks_the_server_and_shows_the_caller(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "milvus.test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("milvus.test")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (tmp_path / "cert.pem").write_bytes(pem)
    (tmp_path / "key.pem").write_bytes(key_pem)
    credentials = grpc.ssl_server_credentials([(key_pem, pem)], pem, require_client_auth=True)
    with serving(Scripted(), credentials) as address:
        access = MilvusAccess(
            address=address,
            tls=True,
            ca_file=tmp_path / "cert.pem",
            cert_file=tmp_path / "cert.pem",
            key_file=tmp_path / "key.pem",
            server_name="milvus.test",
        )
        with MilvusLink(access) as link:
            assert link.version() == "v1"
        # Not in the clear, not for another name, not without a certificate of one's own.
        others = (
            MilvusAccess(address=address),
            replace(access, server_name=""),
            replace(access, cert_file=None, key_file=None),
        )
        for other in others:
            with MilvusLink(other, policy=RetryPolicy(max_attempts=1)) as link, pytest.raises(NotReady):
                link.version()
    with pytest.raises(NotFound, match="given as a certificate"):
        MilvusLink(replace(access, ca_file=tmp_path / "absent.pem"))
