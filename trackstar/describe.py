"""What an index folder holds, finished or not, as a plain dictionary; and which of its files are not what was written.

Contract: reads index.json, receipts and file sizes; rows and codes are read by `damaged_files` alone. An unfinished
index is described as far as it has come. Everything returned is plain JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trackstar.blobs import local
from trackstar.catalog import RETIRED
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.generation import CodeConfig
from trackstar.index import Index
from trackstar.row_shards import Receipt, finished_shards, read_parts, read_receipt, read_receipts, stem
from trackstar.storage import file_digest, read_json


def describe_index(root: str | Path) -> dict[str, Any]:
    """Identity, rows, generations and sizes of an index.

    Returns:
        index.json's own keys (`model`, `corpus`, `moments`, `blocks`, `dim`, ...) and `path`, `state` ("complete" when
        a generation answers, "rows" with all rows but none active yet, else "encoding"), `rows` (counts), `moments.fit`
        (mean and worst expected relative squared error of the correction, None where nothing was fitted),
        `generations` (finished and unfinished ones) and `bytes` (by part and in total).

    Raises:
        NotFound, Incompatible, CorruptArtifact: the folder holds no index, or one that cannot be read.
    """
    index = Index(root)
    home = local(index.root)
    receipts = _receipts(home / "rows")
    complete = bool(read_parts(home / "rows"))
    active = _optional(home / "active.json").get("generation")
    parts = ("rows", "statistics", "generations")
    sizes = {part: _folder_bytes(home / part) for part in parts}
    return {
        **index.facts,
        "path": str(root),
        "state": "complete" if active is not None and complete else "rows" if complete else "encoding",
        "moments": {**index.facts["moments"], "fit": _fit(home / "correction.safetensors")},
        "rows": {
            "complete": complete,
            "shards": len(receipts),
            "passages": sum(receipt.num_passages for receipt in receipts),
            "tokens": sum(receipt.num_tokens for receipt in receipts),
        },
        "generations": [
            _generation(folder, active, index.layout.dim)
            for folder in sorted((home / "generations").glob("*"))
            if folder.is_dir()
        ],
        "bytes": {**sizes, "total": _folder_bytes(home)},
    }


def damaged_files(root: str | Path) -> list[str]:
    """A sentence about every file of rows and generations whose bytes are not those its receipt was written for.

    Raises:
        NotFound, Incompatible: the folder holds no index, or one of another format.
    """
    index = local(Index(root).root)
    expected: dict[Path, str] = {}
    for receipt in _receipts(index / "rows"):
        path = stem(index / "rows", receipt.shard)
        expected[path.with_suffix(".safetensors")] = receipt.rows_digest
        expected[path.with_suffix(".parquet")] = receipt.sidecar_digest
    for note in sorted((index / "generations").glob("*/generation.json")):
        expected.update({note.parent / name: digest for name, digest in read_json(note)["files"].items()})
        codes = sorted((note.parent / "codes").glob("*.json"))
        expected.update({path.with_suffix(".safetensors"): read_json(path)["digest"] for path in codes})
    return [sentence for path, digest in expected.items() if (sentence := _damage(path, digest))]


def _receipts(rows: Path) -> list[Receipt]:
    """Of all shards that are there, in finished parts and in one that is being built."""
    parts = [receipt for part in read_parts(rows) for receipt in read_receipts(rows, part)]
    known = {receipt.shard for receipt in parts}
    others = [read_receipt(rows, shard) for shard in finished_shards(rows) if shard not in known]
    return parts + [receipt for receipt in others if receipt is not None]


def _damage(path: Path, digest: str) -> str | None:
    try:
        found = file_digest(path)
    except NotFound:
        return f"{str(path)!r} is missing"
    return None if found == digest else f"{str(path)!r} has digest {found[:12]}, {digest[:12]} was written"


def _fit(path: Path) -> dict[str, Any] | None:
    """Errors that stand in the header of the correction."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            errors: dict[str, float] = json.loads(file.metadata()["errors"])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CorruptArtifact(f"{str(path)!r} is unreadable; delete the index folder and build it again") from error
    if not errors:
        return None
    worst = max(errors, key=lambda name: errors[name])
    return {"mean": sum(errors.values()) / len(errors), "worst": errors[worst], "worst_weight": worst}


def _generation(home: Path, active: str | None, dim: int) -> dict[str, Any]:
    facts = _optional(home / "generation.json")
    if facts:
        facts["code"]["size"] = CodeConfig(**facts["code"]).spec(dim).size
    return {
        "name": home.name,
        "finished": bool(facts),
        "active": home.name == active,
        "retired": (home / RETIRED).is_file(),
        "audit": _optional(home / "audit.json") or None,
        **{key: facts[key] for key in ("mix", "weight", "code", "background") if key in facts},
        "bytes": _folder_bytes(home),
    }


def _optional(path: Path) -> dict[str, Any]:
    """A JSON file that an unfinished index need not have; empty without it."""
    return dict(read_json(path)) if path.is_file() else {}


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
