"""Runs jobs on a Ray cluster, by the REST API of its dashboard.

A job's submission id is its own id, which Ray takes once. Plain HTTP of the standard library: the gateway's image holds
no Ray. Redirects and proxies are not followed, so that the token goes nowhere else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from services.gateway.job_runners import Run, command_of, first_line, last_error, last_line
from trackstar.errors import InvalidRequest, NotReady, TrackstarError

_ANSWER_BYTES = 1 << 20
_STATES: dict[str, Literal["pending", "running", "succeeded", "failed", "stopped"]] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayJobRunner:
    """A `JobRunner`.

    Args:
        address: http(s)://host:port of the dashboard.
        command: words of the entrypoint.
        token_file: file that holds the cluster's token and nothing else; it is read for every request.
        ca_file: authorities to check the dashboard with; None for the system's.
        environment: variables of the job.
        timeout_seconds: of one request.

    Raises:
        InvalidRequest: the address is no URL.
    """

    def __init__(
        self,
        address: str,
        *,
        command: Sequence[str],
        token_file: Path | None = None,
        ca_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 30.0,
    ) -> None:
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"{address!r} is not http(s)://host:port", field="reindex.ray_address")
        self._address = address
        self._host, self._port, self._prefix = parts.hostname, parts.port, parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._command = tuple(command)
        self._token_file = token_file
        self._ca_file = ca_file
        self._environment = dict(environment or {})
        self._timeout_seconds = timeout_seconds

    def submit(self, job_id: str, config: str) -> None:
        """See `JobRunner.submit`."""
        body = {
            "entrypoint": shlex.join(command_of(self._command, job_id, config)),
            "submission_id": job_id,
            "runtime_env": {"env_vars": self._environment} if self._environment else {},
            "metadata": {"trackstar_job": job_id},
        }
        status, text = self._ask("POST", "/api/jobs/", body)
        # It refuses ids that it knows: an earlier try got through.
        if status == http.HTTPStatus.OK or self.state(job_id) is not None:
            return
        reason = last_line(text)
        if status == http.HTTPStatus.BAD_REQUEST:
            raise TrackstarError(f"Ray does not take the job: {reason}")
        raise NotReady(f"Ray cannot start the job now: {reason}")

    def state(self, job_id: str) -> Run | None:
        """See `JobRunner.state`."""
        status, text = self._ask("GET", f"/api/jobs/{job_id}")
        if status == http.HTTPStatus.NOT_FOUND:
            return None
        content = self._content(status, text)
        found = _STATES.get(str(content.get("status")))
        if found is None:
            raise NotReady(f"Ray at {self._address} tells an unknown state of job {job_id!r}")
        if found != "failed":
            return Run(state=found)
        said = str(content.get("message") or "")
        return Run(state=found, message=last_error(said) or first_line(said) or "Ray does not say why")

    def stop(self, job_id: str) -> None:
        """See `JobRunner.stop`."""
        status, text = self._ask("POST", f"/api/jobs/{job_id}/stop")
        if status != http.HTTPStatus.NOT_FOUND:
            self._content(status, text)

    def _content(self, status: int, text: str) -> dict[str, Any]:
        if status != http.HTTPStatus.OK:
            raise NotReady(f"Ray at {self._address} answers {status}: {last_line(text)}")
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise NotReady(f"what listens at {self._address} does not answer like Ray's job API")
        return content

    def _ask(self, method: str, path: str, body: Any = None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        try:
            if self._token_file is not None:
                headers["Authorization"] = f"Bearer {self._token_file.read_text(encoding='ascii').strip()}"
            with contextlib.closing(self._connection()) as connection:
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, self._prefix + path, body=data, headers=headers)
                response = connection.getresponse()
                text = response.read(_ANSWER_BYTES).decode(errors="replace")
        except UnicodeDecodeError as error:
            raise NotReady(f"{str(self._token_file)!r} holds no token") from error
        except (OSError, http.client.HTTPException) as error:
            what = str(error).rstrip(".") or type(error).__name__
            raise NotReady(f"Ray at {self._address} cannot be asked: {what}") from error
        if response.status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            raise NotReady(f"Ray at {self._address} does not take this gateway's token; set reindex.token_file")
        return response.status, text

    def _connection(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_seconds)
        context = ssl.create_default_context(cafile=None if self._ca_file is None else str(self._ca_file))
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_seconds, context=context)
