"""The gateway's settings: one YAML file, and environment variables over it.

Contract: `load` refuses unknown keys and values out of range in one sentence that names the key. The environment's
`TRACKSTAR_GATEWAY__SECTION__KEY` replaces one key; its value is read as YAML. Nothing here opens files other than the
settings themselves.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from trackstar.errors import InvalidRequest, NotFound

PREFIX = "TRACKSTAR_GATEWAY__"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListenConfig(_Section):
    """Where the gateway can be reached."""

    address: str = Field(
        default="127.0.0.1:50051", description="host:port of gRPC, or unix:PATH; port 0 takes a free one"
    )
    metrics_address: str | None = Field(
        default="127.0.0.1:9464", description="host:port of metrics over HTTP; null for none"
    )
    health_address: str | None = Field(
        default=None,
        description="host:port of a second port that answers health checks alone, in plain text and without tokens, "
        "from before the index is opened; null for none",
    )
    reflection: bool = Field(default=True, description="whether clients may list the services and their messages")

    @field_validator("address", "metrics_address", "health_address")
    @classmethod
    def _has_port(cls, address: str | None) -> str | None:
        if address is not None and not address.startswith("unix:"):
            split_address(address)
        return address

    @field_validator("metrics_address", "health_address")
    @classmethod
    def _is_tcp(cls, address: str | None) -> str | None:
        if address is not None and address.startswith("unix:"):
            raise ValueError("metrics and probes are served over TCP; give host:port")
        return address


class TlsConfig(_Section):
    """Files of the server's identity, all PEM. They are read again when they change."""

    certificate: Path | None = Field(
        default=None, description="certificate chain of the server; none serves plain text"
    )
    key: Path | None = Field(default=None, description="its private key, without a passphrase")
    client_ca: Path | None = Field(default=None, description="authorities that client certificates must come from")
    require_client_certificate: bool = Field(default=False, description="whether clients must show one of `client_ca`")
    reload_seconds: float = Field(default=10.0, ge=0, le=86400, description="how often changes are looked for, seconds")

    @model_validator(mode="after")
    def _is_whole(self) -> TlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key come together")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client_ca needs a certificate and a key of the server")
        if (self.client_ca is not None) != self.require_client_certificate:
            raise ValueError("client_ca and require_client_certificate: true come together")
        return self


class AuthConfig(_Section):
    """Who may call."""

    principals_file: Path | None = Field(
        default=None, description="YAML or JSON file of callers, see services/gateway/auth.py"
    )
    anonymous: bool | None = Field(
        default=None,
        description="whether calls without a token are let in, with all rights; only where just this machine can call. "
        "null: yes if there is no principals_file",
    )
    reload_seconds: float = Field(default=5.0, ge=0, le=86400, description="how often changes are looked for, seconds")


class AdmissionConfig(_Section):
    """How many calls run, and how many wait."""

    max_in_flight: int = Field(default=32, ge=1, le=10_000, description="calls that run at once")
    max_queued: int = Field(
        default=64, ge=0, le=100_000, description="calls that wait for one to end; more are refused"
    )
    max_wait_seconds: float = Field(default=5.0, ge=0, le=3600, description="longest wait, seconds")


class DeadlineConfig(_Section):
    """How long a call may take."""

    default_seconds: float = Field(
        default=60.0, gt=0, le=86400, description="for clients that name no deadline, seconds"
    )
    max_seconds: float = Field(default=600.0, gt=0, le=86400, description="longest that any client gets, seconds")

    @model_validator(mode="after")
    def _is_ordered(self) -> DeadlineConfig:
        if self.default_seconds > self.max_seconds:
            raise ValueError("default_seconds must not be above max_seconds")
        return self


class ConnectionConfig(_Section):
    """Messages and connections."""

    max_request_bytes: int = Field(
        default=4 << 20, ge=1024, le=(1 << 31) - 1, description="longest message received, bytes"
    )
    max_response_bytes: int = Field(
        default=64 << 20, ge=1024, le=(1 << 31) - 1, description="longest message sent, bytes"
    )
    keepalive_seconds: float = Field(
        default=60.0, ge=1, le=86400, description="a silent client is pinged after, seconds"
    )
    keepalive_timeout_seconds: float = Field(
        default=20.0, ge=1, le=3600, description="and given up without an answer after"
    )
    min_ping_seconds: float = Field(
        default=10.0, ge=1, le=3600, description="clients that ping more often are disconnected"
    )
    max_age_seconds: float = Field(
        default=1800.0,
        ge=1,
        le=86400,
        description="clients are asked to connect anew after, seconds; spreads load over replicas",
    )
    max_age_grace_seconds: float = Field(
        default=600.0, ge=1, le=86400, description="time for their running calls, seconds"
    )


class TracingConfig(_Section):
    """OpenTelemetry spans."""

    endpoint: str | None = Field(
        default=None, description="OTLP collector as http(s)://host:port (gRPC); null for no spans"
    )
    sample_ratio: float = Field(default=1.0, ge=0, le=1, description="share of calls traced that come without a trace")


class BackendConfig(_Section):
    """Where encoder and reranker are, unless they run in this process."""

    encoder_address: str | None = Field(default=None, description="host:port of EncoderService; null: in this process")
    reranker_address: str | None = Field(
        default=None, description="host:port of RerankerService; null: in this process"
    )
    application: str | None = Field(default=None, description="name of the Ray Serve application behind both addresses")


class MilvusConfig(_Section):
    """A Milvus server that holds the coarse codes; without one they are searched where the index folder says."""

    address: str | None = Field(default=None, description="host:port of its gRPC port; null for none")
    database: str = Field(default="", description="of the server; empty for its default one")
    collection_prefix: str = Field(
        default="trackstar_",
        pattern=r"[A-Za-z_]\w{0,100}",
        description="a generation's collection is this and its name",
    )
    token_file: Path | None = Field(
        default=None,
        description="file that holds a token, or user:password, and nothing else; null for a server without",
    )
    tls: bool = Field(default=False, description="encrypt, and check the server's certificate")
    ca_file: Path | None = Field(default=None, description="authorities to check it with; null for the system's")
    timeout_seconds: float = Field(default=60.0, gt=0, le=3600, description="of opening a collection, seconds")
    parallel: int = Field(default=4, ge=1, le=64, description="searches that run at once in one generation")


class ReindexConfig(_Section):
    """Jobs that build other generations; without `config_file` there are none."""

    config_file: Path | None = Field(
        default=None,
        description="YAML file of a whole reindex configuration; a request only changes what it may. null: no jobs",
    )
    allowed_paths: tuple[str, ...] = Field(
        default=(),
        description="absolute folders and URLs below which requests may name files to read; none may be named if empty",
    )
    runner: Literal["process", "ray"] = Field(default="process", description="on this machine, or on a Ray cluster")
    ray_address: str | None = Field(default=None, description="http(s)://host:port of the Ray cluster's dashboard")
    ray_ca_file: Path | None = Field(default=None, description="authorities to check it with; null for the system's")
    token_file: Path | None = Field(
        default=None, description="file that holds the Ray cluster's token and nothing else; null for one without"
    )
    entrypoint: tuple[str, ...] = Field(
        default=("trackstar", "reindex", "{config}", "--job-id", "{job_id}"),
        min_length=1,
        description="words of the command that a job runs, with its configuration and its id filled in",
    )
    environment: dict[str, str] = Field(default={}, description="environment variables of a job, besides the usual")
    timeout_seconds: float = Field(default=30.0, gt=0, le=300, description="of one request to Ray, seconds")
    stop_seconds: float = Field(
        default=30.0, ge=0, le=3600, description="time for a cancelled process to end by itself, seconds"
    )
    poll_seconds: float = Field(default=1.0, ge=0.02, le=60, description="how often jobs are looked at, seconds")
    max_unfinished: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="jobs that wait or run; more are refused. An index is built by one at a time",
    )
    max_watchers: int = Field(default=64, ge=1, le=10_000, description="callers that watch at once; more are refused")

    @model_validator(mode="after")
    def _is_whole(self) -> ReindexConfig:
        if self.config_file is not None and self.runner == "ray" and self.ray_address is None:
            raise ValueError("the runner ray needs ray_address")
        return self


class GatewayConfig(_Section):
    """Everything that can be set."""

    listen: ListenConfig = ListenConfig()
    tls: TlsConfig = TlsConfig()
    auth: AuthConfig = AuthConfig()
    admission: AdmissionConfig = AdmissionConfig()
    deadline: DeadlineConfig = DeadlineConfig()
    connection: ConnectionConfig = ConnectionConfig()
    tracing: TracingConfig = TracingConfig()
    backends: BackendConfig = BackendConfig()
    milvus: MilvusConfig = MilvusConfig()
    reindex: ReindexConfig = ReindexConfig()
    drain_seconds: float = Field(default=30.0, ge=0, le=3600, description="time for running calls at the end, seconds")
    notice_seconds: float = Field(
        default=0.2,
        ge=0,
        le=60,
        description="before that, time in which new calls are told to go elsewhere, seconds; gRPC would only cancel "
        "those that it meets at the moment of closing",
    )
    readiness_seconds: float = Field(
        default=5.0, ge=0.05, le=3600, description="how often readiness is looked at, seconds"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe line logged"
    )

    @model_validator(mode="after")
    def _denies_by_default(self) -> GatewayConfig:
        local = is_loopback(self.listen.address)
        if self.auth.anonymous and not local:
            raise ValueError(
                f"auth.anonymous: anyone could call {self.listen.address}; listen on 127.0.0.1 or set principals_file"
            )
        if self.auth.principals_file is None and not (local and self.auth.anonymous is not False):
            raise ValueError(f"auth.principals_file: nobody may call {self.listen.address} without one")
        return self

    @property
    def lets_anyone_in(self) -> bool:
        """Whether calls without a token get an answer."""
        return self.auth.principals_file is None if self.auth.anonymous is None else self.auth.anonymous


def load(path: Path | None, environment: Mapping[str, str]) -> GatewayConfig:
    """Settings from a file (defaults for None), with the environment's over them.

    Raises:
        NotFound: no such file.
        InvalidRequest: not YAML, an unknown key, or a value out of range; `field` is the dotted key.
    """
    values: Any = {}
    if path is not None:
        if not path.is_file():
            raise NotFound(f"there is no settings file {str(path)!r}")
        values = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(values, dict):
        raise InvalidRequest(f"{str(path)!r} must hold a mapping of sections")
    for variable, text in sorted(environment.items()):
        if variable.startswith(PREFIX):
            _replace(values, variable.removeprefix(PREFIX).lower().split("__"), _yaml(text, variable), variable)
    return check(values)


def check(values: Mapping[str, Any]) -> GatewayConfig:
    """Settings from nested values.

    Raises:
        InvalidRequest: as `load`.
    """
    try:
        return GatewayConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidRequest(f"gateway settings: {key}: {message}" if key else message, field=key or None) from error


def split_address(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port.

    Raises:
        ValueError: it is not host:port.
    """
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not bare or not port.isdecimal() or int(port) > 65535 or (":" in bare and not host.startswith("[")):
        raise ValueError(f"{address!r} is not host:port")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether only this machine can connect to what listens there."""
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{origin} is not YAML: {' '.join(str(error).split())}") from error


def _replace(values: dict[str, Any], keys: list[str], value: Any, variable: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise InvalidRequest(f"{variable}: {key!r} is not a section")
    values[keys[-1]] = value
