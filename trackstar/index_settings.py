"""The settings that an index was built with, so that it can be built on without saying them again.

Reads index.json, the plans of its parts and what the active generation says of itself. Task queries are not kept, only
their digest: whoever builds on a task mix names them again.
"""

from __future__ import annotations

from typing import Any

from trackstar.blobs import Location
from trackstar.catalog import Catalog
from trackstar.errors import CorruptArtifact
from trackstar.runs import planned_corpora
from trackstar.storage import read_json


def settings_of(root: Location) -> dict[str, Any]:
    """What `index_config.make_config` takes.

    Raises:
        NotFound, Incompatible: there is no index, or one of another format.
        CorruptArtifact: it does not say what it was built with.
    """
    catalog = Catalog(root)
    facts = catalog.facts
    try:
        corpora = planned_corpora(catalog.root / "rows") or [dict(facts["corpus"])]
        for corpus in corpora:
            corpus.pop("fingerprint", None)
        found: dict[str, Any] = {
            "corpus": corpora[0],
            "append": corpora[1:],
            "model": facts["model"]["path"],
            "moments": facts["moments"],
            "projection": {
                **facts["projection"],
                "rows": facts["blocks"][0]["rows"],
                "cols": facts["blocks"][0]["cols"],
            },
            **{key: facts[key] for key in ("window_tokens", "row_dtype", "compute_dtype", "shard_passages")},
            **{key: facts[key] for key in ("max_batch_tokens", "exclude")},
            "objective": facts.get("objective", "loss"),
        }
        name = catalog.pointer()
        if name is not None and name in catalog.finished():
            generation = read_json(catalog.home(name) / "generation.json")
            found |= {key: generation[key] for key in ("mix", "code", "background")}
            found["refit"] = generation["parts"] > 1 and generation["statistics"] == generation["rows"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CorruptArtifact(
            f"{str(catalog.root / 'index.json')!r} does not say what the index was built with; give all settings again"
        ) from error
    return found
