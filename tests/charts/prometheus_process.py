"""A Prometheus of its own on the loopback, in a folder of its own, ended by its id."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.service.ray_process import free_port


class PrometheusProcess:
    """Scrapes and evaluates every second until `close`.

    Args:
        folder: for its configuration, its data and its log; empty.
        rules: a file of rules.
        targets: address of each, with its labels; `job` among them.
    """

    def __init__(self, folder: Path, rules: Path, targets: Mapping[str, Mapping[str, str]]) -> None:
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [
                {
                    "job_name": "targets",
                    "static_configs": [
                        {"targets": [address], "labels": dict(labels)} for address, labels in targets.items()
                    ],
                }
            ],
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        self.log = folder / "log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_ready, seconds=60, what="Prometheus is ready")
        except BaseException:
            self.close()
            raise

    def query(self, expr: str) -> list[dict[str, Any]]:
        """What an expression returns now.

        Raises:
            AssertionError: it is none; the message is Prometheus' own.
        """
        found: list[dict[str, Any]] = self._get("/api/v1/query", query=expr)["result"]
        return found

    def firing(self) -> list[dict[str, Any]]:
        """All alerts that fire, with labels and annotations."""
        return [alert for alert in self._get("/api/v1/alerts")["alerts"] if alert["state"] == "firing"]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=5):
                return True
        except OSError:
            return False


def wait_until(
    condition: Callable[[], Any], *, seconds: float, what: str, meanwhile: Sequence[Callable[[], object]] = ()
) -> None:
    """Ask again and again, doing something meanwhile, until it is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what}"
        for work in meanwhile:
            work()
        time.sleep(0.2)
