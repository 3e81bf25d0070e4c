"""An index on disk or in an object store: what it was built from, its rows, and its generations.

    index.json                 identity: checkpoint, corpus, moments, projection, encoding; fixed by the first run
    correction.safetensors     the optimizer correction of every weight matrix, so that queries get the same one
    rows/                      see `rows`
    statistics/                R_train and R_task
    generations/<id>/          see `generation`
    active.json                the generation that answers

Opening validates: a missing part, other digests or another format is one clear error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trackstar.blobs import Location, RemotePath
from trackstar.catalog import FORMAT as FORMAT
from trackstar.catalog import Catalog
from trackstar.encode import Encoder, fold_factors
from trackstar.errors import CorruptArtifact, Incompatible, InvalidRequest, NotFound
from trackstar.evaluation.outputs import OBJECTIVES
from trackstar.generation import Generation, open_rows, read_facts
from trackstar.loss import Objective
from trackstar.model import LoadedModel, load_model
from trackstar.moments import SeparableScale
from trackstar.projection import Block, BlockLayout
from trackstar.row_shards import finished_shards, purged_shards
from trackstar.rows import RowStore
from trackstar.storage import publish, publish_json, read_json

Correction = dict[str, SeparableScale | Tensor]
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Index:
    """Read access to an index: a folder, the URL of one in an object store, or what `blobs.location` made of it.

    Raises:
        NotReady: the object store does not answer.
        NotFound: the folder holds no index.
        Incompatible: it was written in another format.
    """

    def __init__(self, root: str | Location) -> None:
        self.catalog = Catalog(root)
        self.root = self.catalog.root
        self.facts: dict[str, Any] = self.catalog.facts

    @property
    def layout(self) -> BlockLayout:
        """Blocks of a row."""
        return BlockLayout(
            blocks=tuple(
                Block(name=block["name"], rows=block["rows"], cols=block["cols"]) for block in self.facts["blocks"]
            )
        )

    def rows(self, name: str | None = None, *, retired: bool = False) -> RowStore:
        """The rows that a generation stands on; those of all finished parts if none is named. `retired`: see `Catalog`.

        Raises:
            NotFound: no generation of that name.
            NotReady: there are no finished rows.
        """
        folder = self.root / "rows"
        if name is not None:
            return open_rows(folder, read_facts(self.catalog.home(name, retired=retired)))
        # Of purged shards the version that was encoded may have been collected.
        encoded = set(finished_shards(folder))
        versions = {shard: version for shard, version in purged_shards(folder) if shard not in encoded}
        return RowStore(folder, versions=versions)

    def generation_names(self) -> list[str]:
        """Names of the finished generations."""
        return self.catalog.finished()

    def active(self) -> str:
        """Name of the generation that answers.

        Raises:
            NotReady: none is active yet.
        """
        return self.catalog.active()

    def generation(
        self,
        name: str | None = None,
        *,
        rows: RowStore | None = None,
        searched: bool = True,
        retired: bool = False,
    ) -> Generation:
        """Open a generation, the active one by default; `searched` as of `Generation`, `retired` as of `Catalog.home`.

        Raises:
            NotFound: no generation of that name.
        """
        name = name or self.active()
        home = self.catalog.home(name, retired=retired)
        return Generation(home, rows or self.rows(name, retired=retired), self.layout, searched=searched)

    def load_model(
        self, path: str | Path | None = None, *, device: str = "cpu", trust_remote_code: bool = False
    ) -> LoadedModel:
        """The checkpoint that the rows were made with.

        Args:
            path: its folder now, if it has moved.
            device: a torch device.
            trust_remote_code: run Python code that the folder brings.

        Raises:
            Incompatible: it is another checkpoint; both digests are named.
        """
        folder = path or self.facts["model"]["path"]
        loaded = load_model(
            folder,
            dtype=COMPUTE_DTYPES[self.facts["compute_dtype"]],
            device=device,
            trust_remote_code=trust_remote_code,
            exclude=self.facts["exclude"],
        )
        self.check_model(folder, loaded)
        return loaded

    def check_model(self, folder: str | Path, loaded: LoadedModel) -> None:
        """Compare a checkpoint with the one that the rows are made with.

        Raises:
            Incompatible: it is another; both digests are named.
        """
        if loaded.digest != self.facts["model"]["digest"]:
            raise Incompatible(
                f"{str(folder)!r} has digest {loaded.digest[:12]}, the index was built with checkpoint "
                f"{self.facts['model']['digest'][:12]}; give the checkpoint it was built with"
            )

    @property
    def objective(self) -> Objective:
        """What rows hold the gradient of.

        Raises:
            Incompatible: this version does not know it.
        """
        name = self.facts.get("objective", _DEFAULTS["objective"])
        if name not in OBJECTIVES:
            raise Incompatible(
                f"{str(self.root)!r} holds gradients of {name!r}, this version knows {', '.join(OBJECTIVES)}; "
                "build it again"
            )
        return OBJECTIVES[name]

    def encoder(self, loaded: LoadedModel, *, length_step: int = 1) -> Encoder:
        """An encoder that makes rows of the same kind as the index holds; `length_step` as of `Encoder`."""
        correction = load_correction(self.root / "correction.safetensors")
        factors = fold_factors(loaded, self.layout, correction, seed=self.facts["projection"]["seed"])
        return Encoder(
            loaded,
            self.layout,
            factors,
            max_batch_tokens=self.facts["max_batch_tokens"],
            objective=self.objective,
            length_step=length_step,
        )


def save_correction(path: Location, correction: Correction) -> None:
    """Publish the correction of every weight matrix."""
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name, scale in correction.items():
        if isinstance(scale, Tensor):
            tensors[f"{name}:elementwise"] = scale.contiguous()
        else:
            tensors[f"{name}:out"] = scale.out.contiguous()
            tensors[f"{name}:in"] = scale.in_.contiguous()
            errors[name] = scale.error
    publish(path, safetensors.torch.save(tensors, {"errors": json.dumps(errors, sort_keys=True)}))


def load_correction(path: Location) -> Correction:
    """What `save_correction` wrote.

    Raises:
        CorruptArtifact: it cannot be read.
    """
    try:
        if isinstance(path, RemotePath):
            data = path.read_bytes()
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            errors = json.loads(header["__metadata__"]["errors"])
        else:
            with safe_open(path, "pt") as file:
                errors = json.loads(file.metadata()["errors"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        correction: Correction = {
            name: SeparableScale(out=tensors[f"{name}:out"], in_=tensors[f"{name}:in"], error=error)
            for name, error in errors.items()
        }
    except (SafetensorError, NotFound, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{str(path)!r} is unreadable; delete the index folder and build it again") from error
    for key, tensor in tensors.items():
        if key.endswith(":elementwise"):
            correction[key.removesuffix(":elementwise")] = tensor
    return correction


# Where things lay and how many tokens went into a batch may change between runs; what they hold may not.
_FREE_TO_CHANGE = ("model.path", "corpus.paths", "corpus.skip_bad", "max_batch_tokens")
# What index.json means where it does not say.
_DEFAULTS = {"objective": "loss"}


def check_identity(root: Location, identity: dict[str, Any]) -> None:
    """Compare what is about to be built with what the folder holds already, if anything.

    Raises:
        Incompatible: the folder holds an index of other things; the message names the first difference and both values.
        InvalidRequest: the folder holds something else than an index.
    """
    path = root / "index.json"
    if path.is_file():
        for key, then, now in differences(read_json(path), identity, ""):
            raise Incompatible(
                f"{str(root)!r} was started with {key} = {then!r}, this command has {now!r}; use the same or build "
                "into another folder"
            )
    elif isinstance(root, Path) and root.exists() and not root.is_dir():
        raise InvalidRequest(f"{str(root)!r} is not a folder; give another --out")
    # What a killed first run leaves, locks, and records of jobs do not count.
    elif root.is_dir() and any(not path.name.startswith(".") and path.name != "jobs" for path in root.glob("*")):
        raise InvalidRequest(f"{str(root)!r} is not empty and holds no index; give another --out")


def fix_identity(root: Location, identity: dict[str, Any]) -> None:
    """Write index.json unless it is there."""
    path = root / "index.json"
    if not path.is_file():
        publish_json(path, identity)


def differences(then: Any, now: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """Dotted key and both values of everything that differs and may not.

    Args:
        then: as it was read from JSON.
        now: as it goes into JSON.
        prefix: key of both.
    """
    return _differences(then, json.loads(json.dumps(now)), prefix)


def _differences(then: Any, now: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    """Dotted key and both values of everything that differs and may not; parts of a list go by their position."""
    if prefix in _FREE_TO_CHANGE:
        return []
    if isinstance(then, list) and isinstance(now, list):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        # A fingerprint differs with anything else beside it, and says least.
        keys = sorted(then.keys() | now.keys(), key=lambda key: (key == "fingerprint", key))
        return [
            difference
            for key in keys
            for difference in _differences(
                then.get(key, _DEFAULTS.get(key)),
                now.get(key, _DEFAULTS.get(key)),
                f"{prefix}.{key}" if prefix else str(key),
            )
        ]
    return [] if then == now else [(prefix, then, now)]
