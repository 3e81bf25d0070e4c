"""R_train of many shards as a tree of sums, so that many workers can make it and a crash costs one node of the tree.

    leaf 0 ─┐            a leaf: Phi^T Phi of a run of shards
    leaf 1 ─┴─► node ─┐
    leaf 2 ─┐         ├─► root ─► R_train = root / rows
    leaf 3 ─┴─► node ─┘

The shape depends on the shards alone and sums are float64, so the bytes are the same whoever makes which node. A leaf
holds enough rows that writing it costs little beside making it, and there are at most 64 leaves: at the paper's size
a node is 2 GiB, and the tree, gone once R_train is there, 256 GiB beside 128 TiB of rows for a billion passages.

    statistics/train-<rows>.safetensors       R_train of these rows, float64 [D_b, D_b] per block
    statistics/train-<rows>/0-000003.safetensors   node 3 of level 0, until then
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from trackstar.blobs import Location
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.hessian import Autocorrelation, ProductSums
from trackstar.projection import BlockLayout
from trackstar.storage import publish, publish_json, read_json
from trackstar.tensor_files import load_tensors

_MAX_LEAVES = 64
# Making a leaf of n rows takes 2 n D^2 operations, writing it 8 D^2 bytes.
_ROWS_PER_DIMENSION = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the tree: a leaf with its shards, or the sum of the nodes 2 index and 2 index + 1 one level below."""

    level: int
    index: int
    shards: tuple[int, ...] = ()


def leaves_of(num_shards: int, shard_passages: int, layout: BlockLayout) -> list[Node]:
    """The leaves over shards 0, 1, …, `num_shards` - 1."""
    largest = max(block.dim for block in layout.blocks)
    size = max(-(-_ROWS_PER_DIMENSION * largest // shard_passages), -(-num_shards // _MAX_LEAVES))
    starts = range(0, num_shards, size)
    return [
        Node(level=0, index=index, shards=tuple(range(start, min(start + size, num_shards))))
        for index, start in enumerate(starts)
    ]


def level_above(nodes: Sequence[Node]) -> list[Node]:
    """The nodes one level above; a last one without a sibling has one child."""
    level = nodes[0].level + 1
    return [Node(level=level, index=index) for index in range(-(-len(nodes) // 2))]


def node_path(folder: Location, node: Node) -> Location:
    """File of a node's sums; `folder` is that of the tree."""
    return folder / f"{node.level}-{node.index:06d}.safetensors"


def save_sums(path: Location, sums: ProductSums) -> None:
    """Publish a node."""
    blocks = {f"{index:03d}": block for index, block in enumerate(sums.blocks)}
    publish(path, safetensors.torch.save({**blocks, "count": torch.tensor([sums.count])}))


def load_sums(path: Location) -> ProductSums:
    """What `save_sums` wrote.

    Raises:
        NotFound: there is no such file.
        CorruptArtifact: it is unreadable.
    """
    try:
        tensors = load_tensors(path)
        count = int(tensors.pop("count"))
    except FileNotFoundError as error:
        raise NotFound(f"there is no {str(path)!r}") from error
    except (SafetensorError, KeyError) as error:
        raise CorruptArtifact(f"{str(path)!r} is unreadable; delete it and give the same command again") from error
    return ProductSums(blocks=tuple(block for _, block in sorted(tensors.items())), count=count)


def add_children(folder: Location, node: Node) -> None:
    """Publish a node above the leaves from its children."""
    children = [Node(level=node.level - 1, index=2 * node.index + side) for side in (0, 1)]
    total = load_sums(node_path(folder, children[0]))
    if node_path(folder, children[1]).is_file():
        total = total + load_sums(node_path(folder, children[1]))
    save_sums(node_path(folder, node), total)


def save_autocorrelation(path: Location, found: Autocorrelation, of: str) -> None:
    """Publish R with the digest of what it was made `of`."""
    blocks = {f"{index:03d}": block for index, block in enumerate(found.blocks)}
    publish(path, safetensors.torch.save(blocks, {"of": of}))
    publish_json(path.with_suffix(".json"), {"of": of, "count": found.count})


def load_autocorrelation(path: Location, of: str) -> Autocorrelation | None:
    """R as it was saved; None if there is none made `of` this.

    Raises:
        CorruptArtifact: it is unreadable.
    """
    try:
        note = read_json(path.with_suffix(".json"))
        if note["of"] != of:
            return None
        blocks = load_tensors(path)
        return Autocorrelation(blocks=tuple(block for _, block in sorted(blocks.items())), count=note["count"])
    except NotFound:
        return None
    except (SafetensorError, FileNotFoundError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{str(path)!r} is unreadable; delete it and give the same command again") from error


def remove_tree(folder: Location, nodes: Sequence[Node]) -> None:
    """Take the nodes away that R was made from."""
    for node in nodes:
        node_path(folder, node).unlink(missing_ok=True)
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
