"""Settings: the file, the environment over it, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from services.gateway.config import PREFIX, GatewayConfig, load, split_address
from trackstar.errors import InvalidRequest, NotFound


def test_file_and_environment(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("admission: {max_in_flight: 3, max_queued: 5}\ndrain_seconds: 7\n")
    environment = {
        f"{PREFIX}ADMISSION__MAX_QUEUED": "9",
        f"{PREFIX}TRACING__ENDPOINT": "http://collector:4317",
        f"{PREFIX}LOG_LEVEL": "debug",
        f"{PREFIX}LISTEN__METRICS_ADDRESS": "null",
        "HOME": "/",
    }
    config = load(path, environment)
    assert (config.admission.max_in_flight, config.admission.max_queued, config.drain_seconds) == (3, 9, 7)
    assert (config.tracing.endpoint, config.log_level) == ("http://collector:4317", "debug")
    assert config.listen.metrics_address is None
    path.write_text("")
    assert load(path, {}) == load(None, {}) == GatewayConfig()
    assert GatewayConfig().listen.address == "127.0.0.1:50051"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("surprise: 1", "surprise"),
        ("admission: {surprise: 1}", "admission.surprise"),
        ("admission: {max_in_flight: 0}", "admission.max_in_flight"),
        ("deadline: {default_seconds: 700}", "deadline"),
        ("listen: {address: nowhere}", "listen.address"),
        ("listen: {address: '::1:80'}", "listen.address"),
        ("listen: {metrics_address: 'unix:/x'}", "listen.metrics_address"),
        ("tls: {certificate: c}", "tls"),
        ("log_level: loud", "log_level"),
        ("drain_seconds: .nan", "drain_seconds"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRequest) as refused:
        load(path, {})
    assert refused.value.field == key
    assert key in str(refused.value)


def test_files_and_variables_that_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    with pytest.raises(NotFound):
        load(path, {})
    for text in ("[1]", "{"):
        path.write_text(text)
        with pytest.raises(InvalidRequest):
            load(path, {})
    for variable in ("ADMISSION__SURPRISE", "SURPRISE", "ADMISSION__MAX_QUEUED__DEEPER", "DRAIN_SECONDS__X"):
        with pytest.raises(InvalidRequest):
            load(None, {PREFIX + "DRAIN_SECONDS": "1", PREFIX + variable: "1"})


def test_every_field_is_described() -> None:
    def fields(model: type[BaseModel]) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = []
        for name, field in model.model_fields.items():
            kind = field.annotation
            nested = isinstance(kind, type) and issubclass(kind, BaseModel)
            found += fields(kind) if nested else [(name, field)]  # type: ignore[arg-type]
        return found

    for name, field in fields(GatewayConfig):
        assert field.description, name
        if name.endswith("_seconds") or field.annotation in (int, float):
            assert field.metadata, f"{name} has no range"


@pytest.mark.parametrize(
    ("address", "parts"), [("h:1", ("h", 1)), ("[::1]:65535", ("::1", 65535)), ("127.0.0.1:0", ("127.0.0.1", 0))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    for bad in ("", ":", "h", "h:", ":1", "h:x", "h:65536", "::1:1", "h:-1"):
        with pytest.raises(ValueError, match="host:port"):
            split_address(bad)
