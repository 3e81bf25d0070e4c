"""Where a client connects to, who it says it is, and how long and how often it tries."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TypedDict, Unpack

import grpc

from trackstar.client_retry import Attempts, RetryPolicy
from trackstar.client_types import Tls
from trackstar.errors import InvalidRequest

_MESSAGE_BYTES = 1 << 26
OPTIONS = [
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    # A gateway that comes back is noticed soon: tries come sooner than gRPC's own second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]
_TIMEOUT_SECONDS = 60.0


class ConnectionOptions(TypedDict, total=False):
    """How a client connects.

    token: shown with every call, over TLS unless the address is this machine. tls: encrypts; in the clear if None.
    timeout_seconds: for one call, all tries included, unless it says otherwise; 60. retry: when a failed call is tried
    again. plaintext_token: send the token in the clear, such as inside a mesh that encrypts by itself.
    """

    token: str | None
    tls: Tls | None
    timeout_seconds: float
    retry: RetryPolicy
    plaintext_token: bool


class Connection:
    """What both clients share.

    Raises:
        InvalidRequest: a token would be sent in the clear, or is none; or a timeout that is none.
    """

    def __init__(self, address: str, **options: Unpack[ConnectionOptions]) -> None:
        token, tls = options.get("token"), options.get("tls")
        self.address = address
        self._timeout_seconds = options.get("timeout_seconds", _TIMEOUT_SECONDS)
        self._retry = options.get("retry", RetryPolicy())
        if not self._timeout_seconds > 0:
            raise InvalidRequest(f"the timeout must be above 0 s, not {self._timeout_seconds:g}")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InvalidRequest("the token holds characters that no token has; does its file hold only the token?")
        if token is not None and tls is None and not options.get("plaintext_token") and not _is_local(address):
            raise InvalidRequest(f"the token would travel to {address} readable by everyone on the way; use TLS")
        self._metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self._credentials = None if tls is None else grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)

    def _attempts(self, timeout_seconds: float | None) -> Attempts:
        return Attempts(self._retry, self._timeout_seconds if timeout_seconds is None else timeout_seconds)


def read_token(path: str | Path) -> str:
    """The token that a file holds, without the white space around it.

    Raises:
        InvalidRequest: there is no such file, or it is empty.
    """
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the token file {str(path)!r} cannot be read") from error
    if not token:
        raise InvalidRequest(f"the token file {str(path)!r} is empty")
    return token


def _is_local(address: str) -> bool:
    """Whether what is sent there stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition("/")[2].rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
