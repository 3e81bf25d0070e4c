"""The server's TLS identity, renewed without a restart.

Contract: certificate, key and client authorities are read again when one of the files changes, at most every
`reload_seconds`, when the next client connects; connections that are open keep what they have. A pair that does not
belong together, such as one caught between two writes, is not taken: what was served before stays, and the log says so
once.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from services.gateway.config import TlsConfig
from trackstar.errors import InvalidRequest

_LOG = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int], ...]


class Certificates:
    """The files of a `TlsConfig`, followed.

    Raises:
        InvalidRequest: they cannot be used.
    """

    def __init__(self, config: TlsConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert config.certificate is not None
        assert config.key is not None
        self._certificate, self._key, self._client_ca = config.certificate, config.key, config.client_ca
        self._reload_seconds = config.reload_seconds
        self._clock = clock
        self._looked = clock()
        self._problem = ""
        try:
            self._signature = self._sign()
            self._first = self._load(self._signature)
        except (OSError, ValueError) as error:
            # An ssl.SSLError is an OSError too.
            raise InvalidRequest(f"the TLS files cannot be used: {error}", field="tls") from error

    def credentials(self) -> grpc.ServerCredentials:
        """For a port whose certificate follows the files."""
        # The annotation leaves out that None means no change.
        fetch = cast(Callable[[], grpc.ServerCertificateConfiguration], self.changed)
        return grpc.dynamic_ssl_server_credentials(
            self._first, fetch, require_client_authentication=self._client_ca is not None
        )

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """New certificates, None if those from before still hold; gRPC asks before each handshake, in its threads."""
        now = self._clock()
        if now - self._looked < self._reload_seconds:
            return None
        self._looked = now
        try:
            signature = self._sign()
            if signature == self._signature:
                return None
            self._signature = signature
            loaded = self._load(signature)
        except (OSError, ValueError) as error:
            if str(error) != self._problem:
                self._problem = str(error)
                _LOG.error("TLS files not read again, those from before are still served: %s", error)
            return None
        self._problem = ""
        _LOG.info("TLS files read again")
        return loaded

    def _load(self, signature: _Signature) -> grpc.ServerCertificateConfiguration:
        """Read all files and check that they fit, so that no handshake has to fail."""
        key, chain = self._key.read_bytes(), self._certificate.read_bytes()
        authorities = None if self._client_ca is None else self._client_ca.read_bytes()
        check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        check.load_cert_chain(self._certificate, self._key, password=lambda: "")
        if self._client_ca is not None:
            check.load_verify_locations(self._client_ca)
        if self._sign() != signature:
            raise ValueError("they changed while they were read")
        return grpc.ssl_server_certificate_configuration([(key, chain)], root_certificates=authorities)

    def _sign(self) -> _Signature:
        files: list[Path] = [self._certificate, self._key, *([self._client_ca] if self._client_ca else [])]
        found = [os.stat(file) for file in files]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)
