"""A small real index for the service tests: a tiny model, a hundred passages, two generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests import tiny
from trackstar.build import build_index, make_config
from trackstar.storage import publish_json, read_json

NUM_PASSAGES = 120
QUERIES = [
    ("the cat sat on", "a mat"),
    ("one two", "three"),
    ("red", "green blue"),
    ("the red cat", "sat on one mat"),
    ("a", "b"),
]
_WORDS = ["cat", "mat", "sat", "one", "two", "three", "red", "green", "blue", "on", "a", "the"]
_SOURCES = ["books", "web", "news"]


def write_corpus(path: Path, first: int, count: int) -> None:
    """Passages from number `first` on, two to a document."""
    generator = np.random.default_rng(first)
    with path.open("w") as stream:
        for number in range(first, first + count):
            record = {
                "id": f"doc-{number // 2}",
                "text": " ".join(generator.choice(_WORDS, generator.integers(2, 9))),
                "source": _SOURCES[number % 3],
                "date": f"20{10 + number % 10}-0{1 + number % 9}-15",
                "language": "en" if number % 4 else "de",
            }
            stream.write(json.dumps(record) + "\n")


def corpus(path: Path) -> dict[str, Any]:
    """What a build is told of a corpus."""
    return {"paths": [str(path)], "source_field": "source", "metadata_fields": ["date", "language"]}


def settings(root: Path, *, store: str = "memory", kind: str = "bits") -> dict[str, Any]:
    """What an index of `root`/corpus.jsonl and `root`/model is built with."""
    return {
        "corpus": corpus(root / "corpus.jsonl"),
        "model": str(root / "model"),
        "projection": {"layer_blocks": 2, "rows": 8, "cols": 8},
        "shard_passages": 32,
        "code": {"store": store, "kind": kind, "size": 256 if kind == "bits" else 64},
        "background": 60,
    }


def build(root: Path, *, store: str = "memory", kind: str = "bits", architecture: str = "llama") -> Path:
    """Build `root`/index with two generations, the first of them active; returns its folder."""
    torch.set_num_threads(1)
    root.mkdir(parents=True, exist_ok=True)
    write_corpus(root / "corpus.jsonl", 0, NUM_PASSAGES)
    tiny.save_model(root / "model", architecture, scale=2.0)
    made = settings(root, store=store, kind=kind)
    index = root / "index"
    build_index(make_config({**made, "mix": {"damping": 0.1}}), index).close()
    first = read_json(index / "active.json")["generation"]
    build_index(make_config({**made, "mix": {"damping": 1.0}}), index).close()
    publish_json(index / "active.json", {"generation": first})
    return index


def other_generation(index: Path) -> str:
    """The generation that does not answer."""
    active = read_json(index / "active.json")["generation"]
    names: list[str] = sorted(path.name for path in (index / "generations").iterdir())
    return next(name for name in names if name != active)
