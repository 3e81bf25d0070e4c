"""The settings in deploy/ are ones that the services take."""

from __future__ import annotations

from pathlib import Path

import yaml

from services.gateway import config
from services.serve.config import SERVICER_FUNCTIONS, ServeConfig

_EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "serve"


def test_the_serve_example_is_taken() -> None:
    content = yaml.safe_load((_EXAMPLES / "serve.yaml").read_text())
    assert content["grpc_options"]["grpc_servicer_functions"] == SERVICER_FUNCTIONS
    (application,) = content["applications"]
    assert application["import_path"] == "services.serve.app:application"
    assert ServeConfig(**application["args"]).gang.ranks == 1


def test_the_gateway_example_is_taken() -> None:
    settings = config.load(_EXAMPLES / "gateway.yaml", {})
    assert settings.backends.application == "trackstar"
    assert settings.milvus.address is None
