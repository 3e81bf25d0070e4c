"""How the files of a generation are made, step by step; each step may be done by another process and done again.

    spec.json                        everything that determines the bytes; its digest is the generation's name
    excluded.safetensors             ids of the deleted passages that are left out, if any were purged
    whitener.safetensors, .json      W = R^(-1/2), one float32 [D_b, D_b] per block, and the task's share lambda
    codes/000007.safetensors, .json  "ids" int64 [c], "codes" [c, .] and "norms" float32 [n] of a shard's n rows, of
                                     which the c that are not excluded have a code; and a receipt
    background.safetensors           ids and rows of a random sample, for z-scores
    norms.safetensors                |W g| of every row, float32 [N]
    codes.parquet                    which shards there are, and the digests of their codes
    generation.json                  digests of all; written last

Codes of a shard are the same wherever shard, whitener, code and deletions are; such a file is taken over from another
generation of the index instead of being made again.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from trackstar.blobs import Location, each
from trackstar.code_config import CodeConfig
from trackstar.code_store import CODE_MANIFEST, MANIFEST_SCHEMA, code_path
from trackstar.codes import Rotation, encode_codes
from trackstar.errors import CorruptArtifact, Incompatible, NotFound
from trackstar.hessian import Autocorrelation, MixConfig, Whitener, mix
from trackstar.projection import BlockLayout
from trackstar.rows import RowStore
from trackstar.storage import digest_of, file_digest, publish, publish_json, read_json, temporary_of
from trackstar.tensor_files import load_arrays, load_tensors

# Code files whose norms are held at once beside the array of all.
_SHARDS_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """Everything that determines a generation's bytes.

    rows: digest of its rows: the first `parts` parts, with `versions` of purged shards. excluded: digest of the ids
    left out, None for none. statistics: digest of the rows that R_train is of. task: digest of the task queries, None
    without. background: size of the sample.
    """

    rows: str
    parts: int
    versions: Mapping[int, str]
    excluded: str | None
    statistics: str
    task: str | None
    mix: MixConfig
    code: CodeConfig
    background: int

    def identity(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": self.rows,
            "parts": self.parts,
            "versions": {str(shard): version for shard, version in sorted(self.versions.items())},
            "excluded": self.excluded,
            **self._whitening(),
            "code": self.code.model_dump(),
            "background": self.background,
        }

    @property
    def name(self) -> str:
        """Of the generation."""
        return digest_of(self.identity())[:12]

    @property
    def coding(self) -> str:
        """Digest of what determines the code of a row, beside the row."""
        code = self.code.model_dump(exclude={"store"})
        return digest_of({**self._whitening(), "code": code})

    def _whitening(self) -> dict[str, Any]:
        return {
            "statistics": self.statistics,
            "task": self.task if self.mix.kind == "task" else None,
            "mix": self.mix.model_dump(),
        }


def start_generation(home: Location, spec: GenerationSpec, excluded: NDArray[np.int64]) -> None:
    """Publish what a generation is to be."""
    if len(excluded):
        publish(home / "excluded.safetensors", safetensors.numpy.save({"ids": excluded}))
    publish_json(home / "spec.json", {**spec.identity(), "coding": spec.coding})


def read_excluded(home: Location) -> NDArray[np.int64]:
    """Ids that are left out, int64, ascending."""
    path = home / "excluded.safetensors"
    found = load_arrays(path)["ids"] if path.is_file() else np.empty(0, dtype=np.int64)
    return found.astype(np.int64)


def make_whitener(
    home: Location, layout: BlockLayout, config: MixConfig, train: Autocorrelation | None, task: Autocorrelation | None
) -> None:
    """Publish W and the task's share.

    Raises:
        InvalidRequest: the mix cannot be made as asked.
    """
    if config.kind == "none" or train is None:
        whitener, weight = Whitener.identity(layout), 0.0
    else:
        correlation, weight = mix(train, task, config)
        whitener = Whitener.fit(correlation, layout, damping=config.damping)
    roots = {f"{index:03d}": root.contiguous() for index, root in enumerate(whitener.inverse_roots)}
    publish(home / "whitener.safetensors", safetensors.torch.save(roots))
    publish_json(home / "whitener.json", {"weight": weight})


def load_whitener(path: Location, layout: BlockLayout) -> Whitener:
    """A whitener as it lies there."""
    return whitener_of(load_tensors(path), path, layout)


def whitener_of(tensors: dict[str, Tensor], path: Location, layout: BlockLayout) -> Whitener:
    """A whitener of a file's tensors.

    Raises:
        Incompatible: it whitens other blocks.
    """
    roots = [root for _, root in sorted(tensors.items())]
    if [len(root) for root in roots] not in ([block.dim for block in layout.blocks], [1] * len(layout.blocks)):
        raise Incompatible(
            f"{str(path)!r} whitens blocks of {[len(root) for root in roots]} dimensions, the rows have "
            f"{[block.dim for block in layout.blocks]}"
        )
    return Whitener(layout, roots)


class Coder:
    """Makes the code files of shards.

    Args:
        home: the generation's folder, with its whitener.
        rows: of the generation.
        layout: blocks of a row.
        code: kind and size.
        coding: `GenerationSpec.coding`.
        others: folders of generations whose codes may be taken over.
        device: where rows are whitened.
    """

    def __init__(
        self,
        home: Location,
        rows: RowStore,
        layout: BlockLayout,
        code: CodeConfig,
        coding: str,
        *,
        others: Sequence[Location] = (),
        device: str = "cpu",
    ) -> None:
        self._home, self._rows, self._others, self._device = home, rows, others, device
        self._spec = code.spec(layout.dim)
        self._rotation = Rotation(layout.dim, code.seed)
        whitener = load_whitener(home / "whitener.safetensors", layout)
        self._whitener = Whitener(layout, [root.to(device) for root in whitener.inverse_roots])
        self._coding = coding
        self._excluded = read_excluded(home)

    def code(self, shard: int) -> int:
        """Publish a shard's codes unless they are there; returns the number of its passages.

        Raises:
            CorruptArtifact: its rows are not what was written.
        """
        count = self._rows.receipts[shard].num_passages
        receipt = code_path(self._home, shard).with_suffix(".json")
        if receipt.is_file():
            return count
        first = self._rows.first(shard)
        inside = self._excluded[slice(*np.searchsorted(self._excluded, (first, first + count)))]
        of = digest_of([self._coding, self._rows.receipts[shard].rows_digest, first, inside.tolist()])
        if not self._take_over(shard, of):
            whitened_ND = self._whitener.apply(self._rows.shard(shard, verify=True).to(self._device))
            norms_N = whitened_ND.norm(dim=1)
            # A row of zeros (a passage without any target) keeps norm 0 and scores 0 against everything.
            unit_ND = whitened_ND / norms_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            kept = np.setdiff1d(np.arange(first, first + count, dtype=np.int64), inside)
            codes = encode_codes(self._spec, self._rotation, unit_ND)[kept - first]
            arrays = {"ids": kept, "codes": np.ascontiguousarray(codes), "norms": norms_N.cpu().numpy()}
            digest = publish(code_path(self._home, shard), safetensors.numpy.save(arrays))
            publish_json(receipt, {"digest": digest, "of": of, "codes": len(kept)})
        return count

    def _take_over(self, shard: int, of: str) -> bool:
        for other in self._others:
            try:
                receipt = read_json(code_path(other, shard).with_suffix(".json"))
            except (NotFound, CorruptArtifact):
                continue
            if receipt.get("of") != of or file_digest(code_path(other, shard)) != receipt["digest"]:
                continue
            _copy(code_path(other, shard), code_path(self._home, shard))
            publish_json(code_path(self._home, shard).with_suffix(".json"), receipt)
            return True
        return False


def _copy(source: Location, target: Location) -> None:
    """The same file under another name; files never change, so that a local one need not be written again."""
    if isinstance(source, Path) and isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(target)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(target)
        return
    publish(target, source.read_bytes())


def nth_kept(excluded: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of the passages at these places, from 0, among those that are not excluded; `excluded` ascends.

    An id is its place, and one more for every excluded passage that comes before.
    """
    ids: NDArray[np.int64] = places + np.searchsorted(excluded - np.arange(len(excluded)), places, side="right")
    return ids


def publish_background(home: Location, rows: RowStore, size: int, excluded: NDArray[np.int64]) -> None:
    """Publish ids and rows of a random sample, unless they are there."""
    path = home / "background.safetensors"
    if path.is_file():
        return
    generator = np.random.Generator(np.random.Philox(key=0))
    num_kept = rows.num_passages - len(excluded)
    places = np.sort(generator.choice(num_kept, size=min(size, num_kept), replace=False)).astype(np.int64)
    ids = nth_kept(excluded, places)
    sample_ND = rows.read(ids).to(torch.bfloat16 if rows.dtype == "bfloat16" else torch.float32)
    publish(path, safetensors.torch.save({"ids": torch.from_numpy(ids), "rows": sample_ND}))


def _norms(home: Location, rows: RowStore) -> NDArray[np.float32]:
    """Norms [N] of all rows from the code files."""
    norms_N, found = np.empty(rows.num_passages, dtype=np.float32), 0
    for start in range(0, rows.num_shards, _SHARDS_AT_ONCE):
        some = range(start, min(rows.num_shards, start + _SHARDS_AT_ONCE))
        for part in each(home, lambda shard: load_arrays(code_path(home, shard), ("norms",))["norms"], some):
            norms_N[found : found + len(part)] = part[: max(0, len(norms_N) - found)]
            found += len(part)
    if found != rows.num_passages:
        raise CorruptArtifact(
            f"the codes in {str(home)!r} hold {found:,} norms for {rows.num_passages:,} rows; delete the folder and "
            "give the same command again"
        )
    return norms_N


def finish_generation(home: Location, spec: GenerationSpec, rows: RowStore) -> None:
    """Publish norms, the list of code files, and what makes the generation finished.

    Raises:
        CorruptArtifact: a shard has no codes.
    """
    shards = range(rows.num_shards)
    receipts = each(home, lambda shard: read_json(code_path(home, shard).with_suffix(".json")), shards)
    norms_N = _norms(home, rows)
    manifest = pa.table(
        {
            "shard": list(shards),
            "passages": [receipt.num_passages for receipt in rows.receipts],
            "codes": [receipt["codes"] for receipt in receipts],
            "digest": [receipt["digest"] for receipt in receipts],
        },
        schema=MANIFEST_SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(manifest, buffer, compression="zstd")
    files = {
        CODE_MANIFEST: publish(home / CODE_MANIFEST, buffer.getvalue()),
        "norms.safetensors": publish(home / "norms.safetensors", safetensors.numpy.save({"norms": norms_N})),
        **{name: file_digest(home / name) for name in ("background.safetensors", "whitener.safetensors")},
    }
    if spec.excluded is not None:
        files["excluded.safetensors"] = file_digest(home / "excluded.safetensors")
    facts = {
        "name": spec.name,
        "coding": spec.coding,
        "weight": float(read_json(home / "whitener.json")["weight"]),
        "num_passages": rows.num_passages,
        "num_codes": sum(receipt["codes"] for receipt in receipts),
        "files": files,
    }
    publish_json(home / "generation.json", {**spec.identity(), **facts})
