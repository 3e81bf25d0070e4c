"""A generation: rows + mix + code, built shard by shard, immutable once active.

    generations/<id>/generation.json          mix, lambda, damping, code, digests; written last: the end of CODING
    generations/<id>/whitener.safetensors     W = R^(-1/2), one float32 [D_b, D_b] per block
    generations/<id>/codes/000007.safetensors "codes" and "norms" = |W g| (float32) of a shard's rows
    generations/<id>/background.safetensors   ids and rows of a random sample, for z-scores
    generations/<id>/coarse/                  the coarse index (Milvus Lite), rebuilt from the codes when absent

The exact score of a passage needs no whitened rows: <R^-1 g_q, g_m> / (|W g_q| |W g_m|) is one dot product with a
pre-multiplied query, times a stored norm. The generation's id is a digest of everything that determines its bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, local
from trackstar.coarse import CoarseIndex
from trackstar.code_config import CodeConfig as CodeConfig
from trackstar.code_store import CodeStore, fill, open_coarse
from trackstar.codes import Rotation, encode_codes
from trackstar.errors import Incompatible, NotFound, NotReady
from trackstar.hessian import Autocorrelation, MixConfig, Whitener, mix
from trackstar.milvus import MilvusLiteIndex
from trackstar.projection import BlockLayout
from trackstar.rows import RowStore
from trackstar.storage import digest_of, file_digest, publish, publish_json, read_json
from trackstar.tensor_files import load_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """What makes one generation differ from another on the same rows."""

    mix: MixConfig
    code: CodeConfig
    background: int = 1000

    def identity(self, rows_digest: str, task_digest: str | None) -> dict[str, object]:
        """Everything that determines the generation's bytes."""
        return {
            "rows": rows_digest,
            "task": task_digest if self.mix.kind == "task" else None,
            "mix": self.mix.model_dump(),
            "code": self.code.model_dump(),
            "background": self.background,
        }


def build_generation(
    folder: Path,
    rows: RowStore,
    layout: BlockLayout,
    config: GenerationConfig,
    *,
    train: Callable[[], Autocorrelation],
    task: tuple[Autocorrelation, str] | None,
    on_rows: Callable[[str, int, int], None] = lambda _step, _done, _total: None,
) -> Generation:
    """Build, or finish building, the generation of `rows` under `config`.

    Args:
        folder: the `generations` folder.
        rows: the finished rows.
        layout: blocks of a row.
        config: mix, code and size of the background sample.
        train: gives R_train; only called when the whitener is not built yet.
        task: R_task and a digest of the task's queries; needed for a task mix.
        on_rows: called with (step, rows done, rows in total).

    Raises:
        InvalidRequest: the mix cannot be made as asked.
        CorruptArtifact: a row shard is not what was written.
    """
    task_correlation, task_digest = task or (None, None)
    identity = config.identity(rows.digest, task_digest)
    name = digest_of(identity)[:12]
    home = folder / name
    if not (home / "generation.json").is_file():
        whitener, weight = _whitener(home, layout, config.mix, train, task_correlation)
        rotation = Rotation(layout.dim, config.code.seed)
        for receipt in rows.receipts:
            path = home / "codes" / f"{receipt.shard:06d}.safetensors"
            if not path.is_file():
                whitened_ND = whitener.apply(rows.shard(receipt.shard, verify=True))
                norms_N = whitened_ND.norm(dim=1)
                # A row of zeros (a passage without any target) keeps norm 0 and scores 0 against everything.
                unit_ND = whitened_ND / norms_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
                codes = encode_codes(config.code.spec(layout.dim), rotation, unit_ND)
                publish(path, safetensors.torch.save({"codes": torch.from_numpy(codes), "norms": norms_N}))
            on_rows("coding", receipt.shard * rows.shard_passages + receipt.num_passages, rows.num_passages)
        _publish_background(home, rows, config.background)
        digests = {str(path.relative_to(home)): file_digest(path) for path in sorted(home.rglob("*.safetensors"))}
        norms = b"".join(
            safetensors.torch.load_file(path)["norms"].numpy().tobytes() for path in sorted(home.glob("codes/*"))
        )
        facts = {"name": name, "weight": weight, "files": digests, "norms": hashlib.sha256(norms).hexdigest()}
        publish_json(home / "generation.json", {**identity, **facts})
    generation = Generation(home, rows, layout)
    generation.import_codes(on_rows)
    return generation


def _whitener(
    home: Path,
    layout: BlockLayout,
    config: MixConfig,
    train: Callable[[], Autocorrelation],
    task: Autocorrelation | None,
) -> tuple[Whitener, float]:
    path, note = home / "whitener.safetensors", home / "whitener.json"
    if note.is_file():
        return _load_whitener(path, layout), float(read_json(note)["weight"])
    if config.kind == "none":
        whitener, weight = Whitener.identity(layout), 0.0
    else:
        correlation, weight = mix(train(), task, config)
        whitener = Whitener.fit(correlation, layout, damping=config.damping)
    publish(
        path, safetensors.torch.save({f"{i:03d}": root.contiguous() for i, root in enumerate(whitener.inverse_roots)})
    )
    publish_json(note, {"weight": weight})
    return whitener, weight


def _load_whitener(path: Location, layout: BlockLayout) -> Whitener:
    return _whitener_of(load_tensors(path), path, layout)


def _whitener_of(tensors: dict[str, Tensor], path: Location, layout: BlockLayout) -> Whitener:
    roots = [root for _, root in sorted(tensors.items())]
    if [len(root) for root in roots] not in ([block.dim for block in layout.blocks], [1] * len(layout.blocks)):
        raise Incompatible(
            f"{str(path)!r} whitens blocks of {[len(root) for root in roots]} dimensions, the rows have "
            f"{[block.dim for block in layout.blocks]}"
        )
    return Whitener(layout, roots)


def _publish_background(home: Path, rows: RowStore, size: int) -> None:
    path = home / "background.safetensors"
    if path.is_file():
        return
    generator = np.random.Generator(np.random.Philox(key=0))
    ids = np.sort(generator.choice(rows.num_passages, size=min(size, rows.num_passages), replace=False)).astype(
        np.int64
    )
    sample_ND = rows.read(ids).to(torch.bfloat16 if rows.dtype == "bfloat16" else torch.float32)
    publish(path, safetensors.torch.save({"ids": torch.from_numpy(ids), "rows": sample_ND}))


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
        try:
            self.facts = read_json(home / "generation.json")
        except NotFound as error:
            raise NotReady(f"generation {home.name!r} is not finished; give the index command again") from error
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
        self._codes = CodeStore(home, self.facts, num_passages=rows.num_passages, shard_passages=rows.shard_passages)
        self.whitener = _whitener_of(self._checked("whitener.safetensors"), home / "whitener.safetensors", layout)
        self.rotation = Rotation(layout.dim, self.code.seed)
        background = self._checked("background.safetensors")
        self.background_ids: NDArray[np.int64] = background["ids"].numpy()
        self.background_rows_ND: Tensor = background["rows"]
        in_memory = searched and self.code.store == "memory"
        self._coarse: CoarseIndex | None = self._open_coarse() if in_memory else None
        self.norms_N: NDArray[np.float32] = self._codes.norms()

    def close(self) -> None:
        """Close the coarse index."""
        if self._coarse is not None:
            self._coarse.close()
            self._coarse = None

    def import_codes(self, on_rows: Callable[[str, int, int], None]) -> None:
        """Fill the coarse index from the codes, from the beginning unless it was finished."""
        if self.code.store == "memory" or (self.home / "coarse" / "receipt.json").is_file():
            return
        folder = local(self.home) / "coarse"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        index = MilvusLiteIndex.create(folder / "milvus.db", dim=self.layout.dim, size=self.spec.size)
        try:
            fill(index, self._codes, lambda done, total: on_rows("importing", done, total))
        finally:
            index.close()
        publish_json(folder / "receipt.json", {"count": self._codes.num_passages})

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
