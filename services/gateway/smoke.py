"""`python -m services.gateway.smoke`: is a gateway healthy, and does it trace? What `helm test` runs.

Contract: waits until the whole server is SERVING, asks one trace with the project's client, and wants proponents with
texts. One sentence, on standard output with exit code 0 or on standard error with 1. All of it within the deadline.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from trackstar.client import Client
from trackstar.client_connection import read_token
from trackstar.client_types import Tls
from trackstar.errors import InvalidRequest, NotReady, TrackstarError

_LOOK_SECONDS = 0.5


def check(
    address: str,
    *,
    prompt: str,
    completion: str,
    token: str | None = None,
    tls: Tls | None = None,
    plaintext_token: bool = False,
    deadline_seconds: float = 120.0,
) -> str:
    """What was found, in one sentence.

    Args:
        address: `host:port` of the gateway.
        prompt: what the model was given.
        completion: what it said.
        token: of a principal, if the gateway wants one.
        tls: how the connection is encrypted; in the clear if None.
        plaintext_token: send the token in the clear.
        deadline_seconds: for everything.

    Raises:
        NotReady: it is not SERVING in time, or answers without passages.
        TrackstarError: the trace fails.
    """
    until = time.monotonic() + deadline_seconds
    _wait(address, tls, until)
    with Client(address, token=token, tls=tls, plaintext_token=plaintext_token) as client:
        answer = client.trace(prompt, completion, k=5, timeout_seconds=max(1.0, until - time.monotonic()))
    proponents = answer.trace.proponents
    if not any(item.passage.text for item in proponents):
        raise NotReady(f"{address} answers, but with no passage for {completion!r} after {prompt!r}")
    best = proponents[0]
    return (
        f"{address} traces: generation {answer.provenance.generation} has {len(proponents)} proponents of "
        f"{completion!r} after {prompt!r}, the best with the score {best.score:+.4f}"
    )


def _wait(address: str, tls: Tls | None, until: float) -> None:
    credentials = None if tls is None else grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
    made = grpc.insecure_channel(address) if credentials is None else grpc.secure_channel(address, credentials)
    said = "it was not asked"
    with made as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        while (left := until - time.monotonic()) > 0:
            try:
                status = stub.Check(health_pb2.HealthCheckRequest(), timeout=min(left, 5.0)).status
            except grpc.RpcError as error:
                said = f"{error.code().name}: {error.details()}"
            else:
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                said = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            time.sleep(min(_LOOK_SECONDS, max(0.0, until - time.monotonic())))
    raise NotReady(f"{address} did not become SERVING in time; the last look said {said}")


def main(
    address: Annotated[str, typer.Option(help="HOST:PORT of the gateway.")],
    prompt: Annotated[str, typer.Option(help="What the model was given.")],
    completion: Annotated[str, typer.Option(help="What it said.")],
    token_file: Annotated[Path | None, typer.Option(help="File that holds a principal's token.")] = None,
    plaintext_token: Annotated[
        bool, typer.Option("--plaintext-token", help="Send the token without TLS, as inside a cluster.")
    ] = False,
    ca_file: Annotated[Path | None, typer.Option(help="PEM file of who signed the gateway; turns TLS on.")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file of a client certificate.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds for everything.")] = 120.0,
) -> None:
    """Check that a gateway is healthy and traces."""
    try:
        tls = None
        if ca_file is not None:
            tls = Tls(ca=_read(ca_file), certificate=_read(certificate), key=_read(key))
        elif certificate is not None or key is not None:
            raise InvalidRequest("a client certificate needs --ca-file: without it there is no TLS")
        found = check(
            address,
            prompt=prompt,
            completion=completion,
            token=None if token_file is None else read_token(token_file),
            tls=tls,
            plaintext_token=plaintext_token,
            deadline_seconds=deadline,
        )
    except TrackstarError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    print(found)


def _read(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{str(path)!r} cannot be read: {error.strerror}") from error


if __name__ == "__main__":
    typer.run(main)
