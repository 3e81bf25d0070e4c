"""`trackstar audit-milvus` on a real Milvus server: what it finds is kept beside the generation, whatever answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from services.commands import audit_milvus
from services.gateway.coarse_milvus import collection_of, connect, fill_collection
from services.gateway.config import MilvusConfig
from tests.milvus_process import MilvusProcess
from tests.service import demo_index
from trackstar.audit_record import read_audit
from trackstar.catalog import Catalog
from trackstar.errors import InvalidRequest, NotFound
from trackstar.milvus_collection import drop


def test_the_codes_that_serve_are_audited(
    milvus: MilvusProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = demo_index.build(tmp_path)
    (tmp_path / "token").write_text(f"{milvus.access.user}:{milvus.access.password}")
    section = {
        "address": milvus.access.address,
        "token_file": str(tmp_path / "token"),
        "collection_prefix": "audited_",
    }
    (tmp_path / "gateway.yaml").write_text(yaml.safe_dump({"milvus": section}))
    settings, catalog = MilvusConfig.model_validate(section), Catalog(str(index))
    name = catalog.active()
    collection = fill_collection(settings, catalog, name)
    try:
        audit_milvus(str(index), config=tmp_path / "gateway.yaml", sample=16, candidates=120, as_json=True)
        found = json.loads(capsys.readouterr().out)
        # Every code is a candidate, so nothing can be missed.
        assert (found["coarse"], found["recall"], found["passed"]) == (collection, 1.0, True)
        assert found["num_codes"] == demo_index.NUM_PASSAGES
        kept = read_audit(catalog.home(name))
        assert kept is not None
        assert kept.coarse == collection
        # The other generation was never sent.
        other = demo_index.other_generation(index)
        with pytest.raises(NotFound, match=collection_of(settings, other)):
            audit_milvus(str(index), config=tmp_path / "gateway.yaml", generation=other)
    finally:
        with connect(settings) as link:
            drop(link, collection)


def test_a_server_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"milvus\.address"):
        audit_milvus(str(tmp_path))
