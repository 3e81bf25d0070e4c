"""The link to a Milvus server: every call with a deadline, retried where that helps, refused at once while it is down.

Calls go out through pymilvus's generated stubs. Its clients are not used: given a timeout, they retry until it ends
whatever `retry_times` says; without one, they wait for a hanging server for ever; and they hold connections in a pool
of the process. Here a call is attempted until one of these is true:

    it is answered                        also by a refusal, which becomes an error of ours
    its deadline has come                 no attempt and no pause goes beyond
    `max_attempts` have failed            for want of an answer, or because the server was asked too much
    the circuit breaker is open           see `trackstar.breaker`

A server that answers that it is starting, recovering or loading is asked again until the deadline. A patient call, for
work in the background, also waits out the last two.

Nothing of pymilvus or gRPC, errors included, leaves this module and `trackstar.milvus_server`. Messages and reprs hold
no credentials. It needs no torch.
"""

from __future__ import annotations

import base64
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import grpc
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from trackstar.breaker import CircuitBreaker, CircuitOpen
from trackstar.errors import Incompatible, InvalidRequest, NotFound, NotReady, Overloaded, StorageFull, TrackstarError

RetryReason = Literal["unavailable", "timeout", "not_ready", "overloaded"]

# A timeout shorter than this says more about its caller than about the server.
_TELLING_SECONDS = 1.0
_RECONNECT_MILLISECONDS = 500
# Codes of Milvus's own errors (its package merr).
_COLLECTION_NOT_FOUND, _COLLECTION_NOT_LOADED, _INDEX_NOT_FOUND, _ALIAS_NOT_FOUND = 100, 101, 700, 1600
_STARTING = {1, 2, 103, 106, *range(400, 402), *range(500, 504), *range(600, 604), *range(901, 906)}
_ASKED_TOO_MUCH = {3, 4, 8, 11}
_FULL = {7}
# Older servers give many errors no code of their own.
_UNCODED = {1, 5, 65535}
_STARTING_TEXT = re.compile(
    r"not (yet )?(ready|healthy|available|serviceable|initialized|fully loaded)|unavailable|initializing|recovering"
    r"|node (not match|offline|lack)|channel (not|lack)|no available|shard leaders|connection refused"
    r"|deadline exceeded|context canceled|context done",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MilvusAccess:
    """Where a Milvus server is, and what it is told about the caller.

    Args:
        address: "host:port" of its gRPC port.
        user, password: of a server that asks for them; sent in the clear unless `tls`.
        token: instead of both, such as an API key.
        tls: encrypt, and check the server's certificate.
        ca_file: PEM certificates to check it with; the system's if not given.
        cert_file, key_file: PEM of the caller's own certificate, for a server that asks for one.
        server_name: name in the server's certificate, where it is not that of the address.
        database: of the server; its default one if not given.

    Raises:
        InvalidRequest: these do not go together.
    """

    address: str
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    tls: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    database: str = ""

    def __post_init__(self) -> None:
        # The address is not repeated: a URL may hold a password.
        if not re.fullmatch(r"[^\s/@]+:\d{1,5}", self.address):
            raise InvalidRequest(
                "the address of a Milvus server is HOST:PORT, such as milvus:19530, without scheme or user"
            )
        if bool(self.user) != bool(self.password) or (self.token and self.user):
            raise InvalidRequest("a Milvus server is given user and password, or a token, or neither")
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidRequest("a certificate for Milvus needs its key, and a key its certificate")
        if not self.tls and (self.ca_file or self.cert_file or self.server_name):
            raise InvalidRequest("certificates for Milvus are given but TLS is off; set tls")

    def metadata(self) -> list[tuple[str, str]]:
        """What goes with every call."""
        secret = self.token or (f"{self.user}:{self.password}" if self.user else "")
        found = [("authorization", base64.b64encode(secret.encode()).decode())] if secret else []
        return [*found, ("dbname", self.database)] if self.database else found


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a call may take and how often it is tried.

    timeout_seconds: of a call that is given none. attempt_seconds: of one attempt. max_attempts: without an answer.
    first_pause_seconds: between the first two attempts; doubled with each up to max_pause_seconds, and shortened at
    random by up to a half, so that callers do not come back together.
    """

    timeout_seconds: float = 60.0
    attempt_seconds: float = 10.0
    max_attempts: int = 6
    first_pause_seconds: float = 0.05
    max_pause_seconds: float = 1.0


class NotLoaded(NotReady):
    """The collection is on the server's disk and must be loaded before it can be searched."""


class NoSuchIndex(NotFound):
    """The collection has no index to load it by."""


class NoSuchAlias(NotFound):
    """The server has no alias of that name."""


class MilvusLink:
    """One connection to a Milvus server, shared by everything that speaks to it. Safe to use from several threads.

    It connects with the first call, and by itself again after the server was away.

    Args:
        access: where and as whom.
        policy: timeouts and retries.
        breaker: shared by all calls; one of its own if not given.
        on_retry: called with the method and the reason before each pause; for metrics.
        clock, sleep, random: for tests.

    Raises:
        NotFound: a certificate's file is missing.
    """

    def __init__(
        self,
        access: MilvusAccess,
        *,
        policy: RetryPolicy | None = None,
        breaker: CircuitBreaker | None = None,
        on_retry: Callable[[str, RetryReason], None] = lambda _method, _reason: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        self.access = access
        self.name = f"Milvus at {access.address!r}"
        self.policy = policy or RetryPolicy()
        self.breaker = breaker or CircuitBreaker(self.name, clock=clock)
        self._on_retry = on_retry
        self._clock, self._sleep, self._random = clock, sleep, random
        self._metadata = access.metadata()
        self._channel = _channel(access)
        self._stub = milvus_pb2_grpc.MilvusServiceStub(self._channel)
        self._closed = False

    def __repr__(self) -> str:
        return f"MilvusLink({self.access.address!r})"

    def __enter__(self) -> MilvusLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; closing twice is harmless."""
        self._closed = True
        self._channel.close()

    def deadline(self, timeout_seconds: float | None = None) -> float:
        """The clock's time in so many seconds, or in as many as a call has that is given none."""
        return self._clock() + (self.policy.timeout_seconds if timeout_seconds is None else timeout_seconds)

    def version(self, *, timeout_seconds: float | None = None) -> str:
        """What the server calls its version, such as "v2.3.5"."""
        answer = self.call("GetVersion", milvus_pb2.GetVersionRequest(), self.deadline(timeout_seconds))
        return str(answer.version)

    def call(
        self, method: str, request: Any, deadline: float, *, patient: bool = False, repeatable: bool = True
    ) -> Any:
        """The server's answer, whose status is success.

        Args:
            method: of the MilvusService.
            request: its message.
            deadline: time of the clock by which the call ends; see `deadline`.
            patient: wait while the server is down; for work that nobody waits for.
            repeatable: whether doing it twice is as good; if not, an attempt without an answer is the last one.

        Raises:
            NotReady: no answer by the deadline, or the server is down, or it refuses the credentials.
            NotLoaded: the collection must be loaded first.
            NotFound: there is no such collection.
            Overloaded: the server was asked too much.
            StorageFull: the server's disk is full.
            Incompatible: the server refuses the request otherwise.
        """
        pause, attempts = self.policy.first_pause_seconds, 0
        while True:
            if self._closed:
                raise InvalidRequest(f"the link to {self.name} is closed; make a new one")
            try:
                return self._attempt(method, request, deadline)
            except CircuitOpen as error:
                if not patient:
                    raise
                failure, wait = _Passing("unavailable", error), min(error.retry_seconds, self.policy.max_pause_seconds)
            except _Passing as passing:
                attempts += passing.reason != "not_ready"
                is_unclear = passing.reason in ("unavailable", "timeout") and not repeatable
                if is_unclear or (attempts >= self.policy.max_attempts and not patient):
                    raise passing.error from passing.__cause__
                failure, wait = passing, pause * (1 - self._random() / 2)
                pause = min(2 * pause, self.policy.max_pause_seconds)
            if self._clock() + wait >= deadline:
                raise failure.error from failure.__cause__
            self._on_retry(method, failure.reason)
            self._sleep(wait)

    def pause(self, seconds: float, deadline: float, what: str) -> None:
        """Wait a little before asking again for `what` is going on.

        Raises:
            NotReady: the deadline would pass.
        """
        if self._clock() + seconds >= deadline:
            raise NotReady(f"{self.name} has not finished {what} in time; it goes on, ask again later")
        self._sleep(seconds)

    def _attempt(self, method: str, request: Any, deadline: float) -> Any:
        seconds = min(deadline - self._clock(), self.policy.attempt_seconds)
        if seconds <= 0:
            raise NotReady(f"no time is left to ask {self.name}")
        with self.breaker.attempt() as attempt:
            try:
                answer = getattr(self._stub, method)(request, timeout=seconds, metadata=self._metadata)
            except grpc.RpcError as error:
                code = error.code()
                telling = seconds >= min(_TELLING_SECONDS, self.policy.attempt_seconds)
                if code == grpc.StatusCode.UNAVAILABLE or (code == grpc.StatusCode.DEADLINE_EXCEEDED and telling):
                    attempt.failed()
                elif code not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                    attempt.succeeded()
                raise self._of_rpc(method, error, seconds) from error
            except ValueError as error:
                # gRPC's word for a channel that was closed meanwhile.
                raise InvalidRequest(f"the link to {self.name} is closed; make a new one") from error
            attempt.succeeded()
        status = answer if isinstance(answer, common_pb2.Status) else answer.status
        if status.code or status.error_code:
            raise self._of_status(method, status)
        return answer

    def _of_rpc(self, method: str, failure: Any, seconds: float) -> Exception:
        code, details = failure.code(), _short(failure.details() or "")
        match code:
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return _Passing(
                    "timeout", NotReady(f"{self.name} did not answer {method} within {seconds:.1f} seconds")
                )
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                return NotReady(f"{self.name} refuses the credentials it is given ({details}); correct them")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return _Passing("overloaded", Overloaded(f"{self.name} cannot take {method} now ({details})"))
            case grpc.StatusCode.UNIMPLEMENTED:
                return Incompatible(f"{self.name} does not know {method}; use a server of another version")
            case _:
                return _Passing("unavailable", NotReady(f"{self.name} does not answer ({code.name}: {details})"))

    def _of_status(self, method: str, status: Any) -> Exception:
        code, reason = status.code, status.reason
        said = f"{self.name} answers {method}: {_short(reason)}"
        if code == _COLLECTION_NOT_FOUND or status.error_code == common_pb2.CollectionNotExists:
            return NotFound(said)
        if code == _COLLECTION_NOT_LOADED:
            return NotLoaded(said)
        if code == _INDEX_NOT_FOUND or status.error_code == common_pb2.IndexNotExist:
            return NoSuchIndex(said)
        if code == _ALIAS_NOT_FOUND:
            return NoSuchAlias(said)
        if code in _FULL:
            return StorageFull(f"{said}; free some space on the server")
        if code in _ASKED_TOO_MUCH or status.error_code == common_pb2.RateLimit:
            return _Passing("overloaded", Overloaded(said))
        if code in _STARTING or status.retriable or (code in _UNCODED and _STARTING_TEXT.search(reason)):
            return _Passing("not_ready", NotReady(said))
        return Incompatible(said)


class _Passing(Exception):
    """A failure that may be gone at the next attempt, and what it becomes if it is not."""

    def __init__(self, reason: RetryReason, error: TrackstarError) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = error


def _channel(access: MilvusAccess) -> grpc.Channel:
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # Retries are ours.
        ("grpc.enable_retries", 0),
        # By default a channel whose server was away waits up to two minutes before it looks again.
        ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MILLISECONDS // 5),
        ("grpc.min_reconnect_backoff_ms", _RECONNECT_MILLISECONDS),
        ("grpc.max_reconnect_backoff_ms", _RECONNECT_MILLISECONDS),
        # A connection whose other end vanished is noticed while a call waits.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        # Channels to one address share a connection, and with it the wait after a failure.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if not access.tls:
        return grpc.insecure_channel(access.address, options=options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem(access.ca_file),
        private_key=_pem(access.key_file),
        certificate_chain=_pem(access.cert_file),
    )
    if access.server_name:
        options.append(("grpc.ssl_target_name_override", access.server_name))  # type: ignore[arg-type]
    return grpc.secure_channel(access.address, credentials, options=options)


def _pem(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise NotFound(
            f"{str(path)!r} cannot be read ({error.strerror}); it was given as a certificate or key"
        ) from error


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:197]}..."
