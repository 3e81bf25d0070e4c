"""The end of generations: retiring one, and collecting what no generation needs any more.

    generations/<id>/retired.json     it is served no more, and its files may go

Contract: nothing that the active generation or any other that is not retired stands on is ever named as garbage; rows
stay as long as one generation uses them, and all rows stay while there is none. `garbage` only lists; `collect` deletes
what it lists, while nobody builds. The collections of retired generations on a Milvus server are for
`services.reindex.collections`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trackstar.blobs import local
from trackstar.catalog import RETIRED, Catalog
from trackstar.errors import CorruptArtifact, InvalidRequest
from trackstar.locks import writing
from trackstar.row_shards import Part, read_parts, stem
from trackstar.storage import is_temporary, publish_json, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """A file or folder that may go: `num_bytes` of it on disk (what other names share counts too), and why."""

    path: Path
    num_bytes: int
    why: str


def retire(catalog: Catalog, name: str) -> None:
    """Have a finished generation served no more; the same again is as good.

    Raises:
        NotFound: no generation of that name.
        InvalidRequest: it is the active one.
    """
    if name == catalog.pointer():
        raise InvalidRequest(f"generation {name!r} answers now; activate another one first")
    home = catalog.generations / name
    if not (home / RETIRED).is_file():
        catalog.home(name)
        publish_json(home / RETIRED, {})


def bring_back(catalog: Catalog, name: str) -> None:
    """Undo `retire`, as long as nothing was collected.

    Raises:
        NotFound: no generation of that name is left.
    """
    (catalog.generations / name / RETIRED).unlink(missing_ok=True)
    catalog.home(name)


def garbage(catalog: Catalog) -> list[Garbage]:
    """What may go, in a local index folder.

    Raises:
        InvalidRequest: the index lies in an object store.
        CorruptArtifact: a generation does not say what it stands on; then nothing is told, to be safe.
    """
    root = local(catalog.root)
    kept = [_facts(catalog, name) for name in catalog.finished()]
    return [*_generations(root, catalog), *_rows(root, kept), *_statistics(root, kept), *_leftovers(root)]


def collect(catalog: Catalog) -> list[Garbage]:
    """Delete what `garbage` lists; returns it.

    Raises:
        NotReady: somebody builds there.
    """
    with writing(catalog.root):
        found = garbage(catalog)
        for item in found:
            if item.path.is_dir():
                # First what makes it a generation: half of one must not be served if this is interrupted.
                (item.path / "generation.json").unlink(missing_ok=True)
                shutil.rmtree(item.path)
            else:
                item.path.unlink(missing_ok=True)
    return found


def _facts(catalog: Catalog, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = read_json(catalog.home(name) / "generation.json")
    if not {"parts", "versions", "statistics", "task"} <= facts.keys():
        raise CorruptArtifact(
            f"generation {name!r} does not say what it stands on; build it again, or delete its folder if it is not "
            "needed"
        )
    return facts


def _generations(root: Path, catalog: Catalog) -> Iterator[Garbage]:
    finished = set(catalog.finished())
    for home in sorted((root / "generations").glob("*")):
        if home.name in finished or not home.is_dir():
            continue
        retired = (home / RETIRED).is_file()
        why = "a retired generation" if retired else "a generation that was begun and not finished"
        yield Garbage(path=home, num_bytes=_size(home), why=why)


def _rows(root: Path, kept: Sequence[dict[str, Any]]) -> Iterator[Garbage]:
    """Versions of shards that no generation uses."""
    if not kept:
        return
    used: set[str] = set()
    for part in read_parts(root / "rows"):
        for shard in _shards(part):
            # Of a part that no generation has yet, the rows wait for one.
            users = [facts for facts in kept if facts["parts"] > part.number]
            used.update(stem(root, shard, facts["versions"].get(str(shard), "")).name for facts in users)
            if not users:
                used.add(stem(root, shard).name)
    known = {f"{shard:06d}" for part in read_parts(root / "rows") for shard in _shards(part)}
    for path in sorted((root / "rows").glob("[0-9]*")):
        name = path.name.partition(".")[0]
        if name.partition("-")[0] in known and name not in used:
            yield Garbage(path=path, num_bytes=path.stat().st_size, why="a shard in a version that nothing uses")


def _statistics(root: Path, kept: Sequence[dict[str, Any]]) -> Iterator[Garbage]:
    used = {f"train-{facts['statistics'][:12]}" for facts in kept}
    used |= {f"task-{facts['task'][:12]}" for facts in kept if facts["task"] is not None}
    for path in sorted((root / "statistics").glob("*")):
        if kept and path.name.partition(".")[0] not in used:
            yield Garbage(path=path, num_bytes=_size(path), why="statistics that no generation was made from")


def _leftovers(root: Path) -> Iterator[Garbage]:
    for path in sorted(root.rglob(".*")):
        if path.is_file() and is_temporary(path):
            yield Garbage(path=path, num_bytes=path.stat().st_size, why="left by a process that was killed")


def _shards(part: Part) -> range:
    return range(part.first_shard, part.first_shard + part.num_shards)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(found.stat().st_size for found in path.rglob("*") if found.is_file())
