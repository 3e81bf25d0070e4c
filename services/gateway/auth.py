"""Who calls: bearer tokens and client certificates against one file of principals.

    principals:
      - name: search-team
        token_sha256: [9f86d0...]             # any of these tokens; `hash-token` makes the digest
        certificates: ["spiffe://prod/search"] # or any of these names of a client certificate (SAN, else CN)
        generations: ["prod-*"]                # shell patterns; all if left out
        may_activate: false
        may_reindex: false                     # start, see and end jobs

Contract: the file holds digests of tokens, never tokens. It is read again when it changes; a broken change is logged
once and the last good content stays. A call with a token stands or falls with it, whatever else it shows; without one
the certificate counts, then the anonymous principal, if there is one. Digests are compared in constant time.
Certificates count only on connections where TLS has verified them.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.gateway.request import Principal
from trackstar.errors import InvalidRequest, NotFound, TrackstarError, Unauthenticated

_LOG = logging.getLogger(__name__)

ANONYMOUS = Principal(name="anonymous", may_activate=True, may_reindex=True)
_SCHEME = "bearer "


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")
    token_sha256: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    generations: tuple[str, ...] = ("*",)
    may_activate: bool = False
    may_reindex: bool = False


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    principals: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a call shows. `names`: of a verified client certificate, alternative names before the common name."""

    authorization: str | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def of_call(
        cls, metadata: Iterable[tuple[str, str | bytes]], auth_context: Mapping[str, Iterable[bytes]]
    ) -> Credentials:
        """From a call's metadata and gRPC's view of its connection."""
        headers = [value for key, value in metadata if key == "authorization"]
        # Two of them may mean two different callers; neither is believed.
        header = headers[0] if len(headers) == 1 else ("" if headers else None)
        secure = b"ssl" in auth_context.get("transport_security_type", ())
        keys = ("x509_subject_alternative_name", "x509_common_name") if secure else ()
        names = [name.decode(errors="replace") for key in keys for name in auth_context.get(key, ())]
        return cls(authorization=header if isinstance(header, str | None) else "", names=tuple(names))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the file says, ready to be asked."""

    by_digest: tuple[tuple[bytes, Principal], ...] = ()
    by_name: Mapping[str, Principal]


class Authenticator:
    """Tells who calls.

    Args:
        path: file of principals; None if there is none.
        anonymous: whoever shows nothing; None to refuse.
        reload_seconds: how often a change of the file is looked for.
        clock: monotonic seconds.

    Raises:
        NotFound, InvalidRequest: the file cannot be used.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        anonymous: Principal | None = None,
        reload_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._anonymous = anonymous
        self._reload_seconds = reload_seconds
        self._clock = clock
        self._looked = clock()
        self._signature = _signature(path)
        self._known = _read(path) if path is not None else _Known(by_name={})

    def identify(self, credentials: Credentials) -> Principal:
        """The principal that `credentials` belong to.

        Raises:
            Unauthenticated: none, with how to become one.
        """
        self._follow_file()
        if credentials.authorization is not None:
            if credentials.authorization[: len(_SCHEME)].lower() != _SCHEME:
                raise Unauthenticated("the authorization must be one 'Bearer TOKEN'")
            found = self._of_token(credentials.authorization[len(_SCHEME) :].strip())
            if found is None:
                raise Unauthenticated("this token is not known")
            return found
        for name in credentials.names:
            if name in self._known.by_name:
                return self._known.by_name[name]
        if self._anonymous is not None:
            return self._anonymous
        if credentials.names:
            raise Unauthenticated(
                "no principal has this client certificate; send a token as 'authorization: Bearer TOKEN'"
            )
        raise Unauthenticated("send a token as 'authorization: Bearer TOKEN'")

    def _of_token(self, token: str) -> Principal | None:
        digest = hashlib.sha256(token.encode("utf-8", errors="replace")).digest()
        found = None
        # All are compared, so that the time tells nothing about which one it is.
        for known, principal in self._known.by_digest:
            if hmac.compare_digest(known, digest):
                found = principal
        return found

    def _follow_file(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked < self._reload_seconds:
            return
        self._looked = now
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._known = _read(self._path)
            _LOG.info("principals read again")
        except (TrackstarError, OSError) as error:
            _LOG.error("principals not read again, those from before still count: %s", error)


def digest_of_token(token: str) -> str:
    """What the file of principals holds for a token.

    Raises:
        InvalidRequest: a token that could be guessed or that no header can carry.
    """
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise InvalidRequest(
            "a token has at least 16 printable ASCII characters and no spaces; let one be made with --new"
        )
    return hashlib.sha256(token.encode()).hexdigest()


def make_token() -> str:
    """A new token of 256 random bits."""
    return secrets.token_urlsafe(32)


def _signature(path: Path | None) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path) if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)


def _read(path: Path) -> _Known:
    if not path.is_file():
        raise NotFound(f"there is no principals file {str(path)!r}")
    try:
        entries = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).principals
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{str(path)!r}: {key}: {first['msg']}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        # Their messages may quote the file.
        raise InvalidRequest(f"{str(path)!r} is not YAML or JSON") from error
    by_digest: dict[bytes, Principal] = {}
    by_name: dict[str, Principal] = {}
    for entry in entries:
        principal = Principal(
            name=entry.name,
            generations=entry.generations,
            may_activate=entry.may_activate,
            may_reindex=entry.may_reindex,
        )
        for text in entry.token_sha256:
            digest = _digest(text, entry.name, path)
            if digest in by_digest:
                raise InvalidRequest(f"{str(path)!r}: {entry.name!r} and {by_digest[digest].name!r} share a token")
            by_digest[digest] = principal
        for name in entry.certificates:
            if name in by_name:
                raise InvalidRequest(f"{str(path)!r}: {entry.name!r} and {by_name[name].name!r} share {name!r}")
            by_name[name] = principal
    return _Known(by_digest=tuple(by_digest.items()), by_name=by_name)


def _digest(text: str, name: str, path: Path) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != hashlib.sha256().digest_size:
        raise InvalidRequest(
            f"{str(path)!r}: {name!r}: token_sha256 holds 64 hexadecimal digits; `hash-token` makes them"
        )
    return digest
