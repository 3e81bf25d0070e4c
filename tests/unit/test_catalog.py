"""The catalog of an index folder: names, facts, the active pointer, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.audits import audited
from trackstar.catalog import FORMAT, Catalog
from trackstar.codes import CodeSpec
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady

_INDEX: dict[str, Any] = {
    "format": FORMAT,
    "model": {"path": "/models/a", "digest": "c" * 64},
    "corpus": {"paths": ["/corpora/a"], "fingerprint": "f" * 64},
    "dim": 96,
    "max_batch_tokens": 512,
}
_GENERATION: dict[str, Any] = {
    "mix": {"kind": "task", "weight": "crossing", "crossing_fraction": 0.1, "damping": 0.25},
    "weight": 0.75,
    "code": {"kind": "bits", "size": None, "store": "memory", "seed": 3},
    "rows": "r" * 64,
    "num_passages": 40,
    "num_codes": 38,
}


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    _write(tmp_path / "index.json", _INDEX)
    for name in ("beta", "alpha"):
        _write(tmp_path / f"generations/{name}/generation.json", {**_GENERATION, "name": name})
        audited(tmp_path, name, 38)
    (tmp_path / "generations/gamma").mkdir()
    return tmp_path


def test_names_and_facts(root: Path) -> None:
    catalog = Catalog(root)
    assert catalog.names() == ["alpha", "beta", "gamma"]
    assert catalog.finished() == ["alpha", "beta"]
    facts = catalog.describe("alpha")
    assert (facts.name, facts.state, facts.num_passages, facts.num_codes, facts.dim) == ("alpha", "ready", 40, 38, 96)
    assert (facts.mix, facts.weight, facts.damping, facts.store) == ("task", 0.75, 0.25, "memory")
    assert facts.spec == CodeSpec(kind="bits", size=128, seed=3)
    assert facts.checkpoint_digest == "c" * 64
    building = catalog.describe("gamma")
    assert (building.state, building.spec, building.num_passages) == ("building", None, 0)


def test_active_follows_the_pointer(root: Path) -> None:
    catalog = Catalog(root)
    assert catalog.pointer() is None
    with pytest.raises(NotReady, match="no active generation"):
        catalog.active()
    catalog.activate("beta")
    assert Catalog(root).active() == "beta"
    assert catalog.describe("beta").state == "active"
    catalog.activate("alpha")
    assert catalog.active() == "alpha"
    assert catalog.describe("beta").state == "ready"


def test_only_finished_generations_are_activated(root: Path) -> None:
    catalog = Catalog(root)
    with pytest.raises(NotReady, match="'gamma' is still being built"):
        catalog.activate("gamma")
    with pytest.raises(NotFound, match="no generation 'delta'; it has alpha, beta"):
        catalog.activate("delta")
    with pytest.raises(NotFound):
        catalog.activate("../generations/alpha")
    audited(root, "alpha", 38, passed=False)
    with pytest.raises(NotReady, match="'alpha' failed its audit: it finds half of the best; when that is done give"):
        catalog.activate("alpha")
    (root / "generations" / "beta" / "audit.json").unlink()
    with pytest.raises(NotReady, match=r"'beta' was not audited yet; give `trackstar audit .* --generation beta`"):
        catalog.activate("beta")
    assert catalog.pointer() is None


def test_config_digest_follows_what_decides_scores_and_nothing_else(root: Path) -> None:
    before = Catalog(root).describe("alpha").config_digest
    moved = {"model": {**_INDEX["model"], "path": "/b"}, "corpus": {**_INDEX["corpus"], "paths": ["/b"]}}
    _write(root / "index.json", {**_INDEX, **moved, "max_batch_tokens": 1})
    assert Catalog(root).describe("alpha").config_digest == before
    _write(root / "index.json", {**_INDEX, "corpus": {**_INDEX["corpus"], "fingerprint": "0"}})
    assert Catalog(root).describe("alpha").config_digest != before
    _write(root / "index.json", _INDEX)
    _write(root / "generations/alpha/generation.json", {**_GENERATION, "name": "alpha", "weight": 0.5})
    assert Catalog(root).describe("alpha").config_digest != before


@pytest.mark.parametrize("broken", [{}, [], {**_GENERATION, "code": {"kind": "x"}}, {**_GENERATION, "mix": None}])
def test_a_broken_generation_is_one_clear_error(root: Path, broken: Any) -> None:
    _write(root / "generations/alpha/generation.json", broken)
    with pytest.raises(CorruptArtifact, match=r"generation\.json"):
        Catalog(root).describe("alpha")


@pytest.mark.parametrize("broken", [{}, [], {"generation": 3}])
def test_a_broken_pointer_is_one_clear_error(root: Path, broken: Any) -> None:
    _write(root / "active.json", broken)
    with pytest.raises(CorruptArtifact, match=r"active\.json"):
        Catalog(root).active()


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no index"):
        Catalog(tmp_path)
    _write(tmp_path / "index.json", {**_INDEX, "format": 99})
    with pytest.raises(Incompatible, match="format 99"):
        Catalog(tmp_path)


@pytest.mark.parametrize("module", ["trackstar.catalog", "trackstar.queries", "trackstar.results", "trackstar.records"])
def test_no_torch_is_imported(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
