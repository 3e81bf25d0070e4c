"""The settings in deploy/ are ones that the services take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from services.gateway import config
from services.reindex import config as reindex_config
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


def test_the_reindex_examples_are_taken() -> None:
    job = reindex_config.load(_EXAMPLES.parent / "reindex" / "job.yaml")
    assert job.build.code.store == "milvus"
    page = (_EXAMPLES.parents[1] / "docs" / "reindexing.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert reindex_config.make(yaml.safe_load(shown)).workers.encoders.max == 32


def test_a_gateway_of_its_own_needs_neither_torch_nor_an_embedded_milvus() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'ray', 'milvus_lite'): sys.modules[name] = None\n"
        "import services.gateway.remote_assembly, services.commands, trackstar.cli, trackstar.client\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
