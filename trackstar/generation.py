"""A generation: rows + mix + code, immutable once it is finished. How its files are made is told in `generation_files`.

The exact score of a passage needs no whitened rows: <R^-1 g_q, g_m> / (|W g_q| |W g_m|) is one dot product with a
pre-multiplied query, times a stored norm. The generation's id is a digest of everything that determines its bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, local
from trackstar.coarse import CoarseIndex
from trackstar.code_config import CodeConfig as CodeConfig
from trackstar.code_store import CodeStore, fill, open_coarse
from trackstar.codes import Rotation
from trackstar.errors import CorruptArtifact, Incompatible, NotFound, NotReady
from trackstar.generation_files import whitener_of
from trackstar.milvus import MilvusLiteIndex
from trackstar.projection import BlockLayout
from trackstar.rows import RowStore
from trackstar.storage import publish_json, read_json
from trackstar.tensor_files import load_tensors


def read_facts(home: Location) -> dict[str, Any]:
    """What a finished generation says of itself.

    Raises:
        NotReady: it is not finished.
    """
    try:
        found: dict[str, Any] = read_json(home / "generation.json")
    except NotFound as error:
        raise NotReady(f"generation {home.name!r} is not finished; give the index command again") from error
    return found


def open_rows(folder: Location, facts: Mapping[str, Any]) -> RowStore:
    """The rows that a generation stands on; raises as `RowStore`."""
    try:
        versions = {int(shard): version for shard, version in facts["versions"].items()}
        return RowStore(folder, parts=facts["parts"], versions=versions)
    except (KeyError, ValueError, AttributeError) as error:
        raise CorruptArtifact(
            f"generation {facts.get('name')!r} does not say which rows it stands on; give the index command again"
        ) from error


class Generation:
    """Read access to one finished generation.

    Args:
        home: its folder.
        rows: the rows it was built on.
        layout: blocks of a row.
        searched: whether its codes are searched here; if so, those held in memory are read and checked at once.

    Raises:
        NotReady: it is not finished.
        Incompatible: it was built on other rows.
        CorruptArtifact: one of its files is not what was written.
    """

    def __init__(self, home: Location, rows: RowStore, layout: BlockLayout, *, searched: bool = True) -> None:
        self.facts = read_facts(home)
        if self.facts["rows"] != rows.digest:
            raise Incompatible(
                f"generation {home.name!r} was built on rows {self.facts['rows'][:12]}, these rows are "
                f"{rows.digest[:12]}; build it again"
            )
        self.home = home
        self.name: str = self.facts["name"]
        self.code = CodeConfig(**self.facts["code"])
        self.spec = self.code.spec(layout.dim)
        self.layout = layout
        self.rows = rows
        self._codes = CodeStore(home, self.facts)
        self.whitener = whitener_of(self._checked("whitener.safetensors"), home / "whitener.safetensors", layout)
        self.rotation = Rotation(layout.dim, self.code.seed)
        background = self._checked("background.safetensors")
        self.background_ids: NDArray[np.int64] = background["ids"].numpy()
        self.background_rows_ND: Tensor = background["rows"]
        in_memory = searched and self.code.store != "milvus-lite"
        self._coarse: CoarseIndex | None = self._open_coarse() if in_memory else None
        self.norms_N: NDArray[np.float32] = self._codes.norms()

    def close(self) -> None:
        """Close the coarse index."""
        if self._coarse is not None:
            self._coarse.close()
            self._coarse = None

    def import_codes(self, on_rows: Callable[[str, int, int], None]) -> None:
        """Fill the coarse index from the codes, from the beginning unless it was finished."""
        if self.code.store != "milvus-lite" or (self.home / "coarse" / "receipt.json").is_file():
            return
        folder = local(self.home) / "coarse"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        index = MilvusLiteIndex.create(folder / "milvus.db", dim=self.layout.dim, size=self.spec.size)
        try:
            fill(index, self._codes, lambda done, total: on_rows("importing", done, total))
        finally:
            index.close()
        publish_json(folder / "receipt.json", {"count": self._codes.num_codes})

    @cached_property
    def excluded(self) -> NDArray[np.int64]:
        """Ids of the passages that were purged, int64, ascending; they have no code."""
        if self.facts["excluded"] is None:
            return np.empty(0, dtype=np.int64)
        ids: NDArray[np.int64] = self._checked("excluded.safetensors")["ids"].numpy()
        return ids

    @property
    def codes(self) -> CodeStore:
        """Its codes on disk."""
        return self._codes

    @property
    def coarse(self) -> CoarseIndex:
        """The coarse index, opened at first use."""
        if self._coarse is None:
            self._coarse = self._open_coarse()
        return self._coarse

    def _open_coarse(self) -> CoarseIndex:
        return open_coarse(self._codes, store=self.code.store, spec=self.spec, dim=self.layout.dim)

    def _checked(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file whose digest is as it should be."""
        data = self._codes.verify(name)
        return load_tensors(self.home / name) if data is None else safetensors.torch.load(data)
