"""Commands on what an index holds: `activate`, `delete`, `retire` and `collect`.

Contract: as `cli`. `collect` only lists unless it is told to delete.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from trackstar.cli_index import print_json
from trackstar.errors import InvalidRequest, NotFound

IndexPath = Annotated[str, typer.Argument(help="Folder or URL of the index.")]


def activate(
    index: IndexPath,
    generation: Annotated[str, typer.Argument(help="The generation that is to answer.")],
) -> None:
    """Make another audited generation the one that answers; also the way back."""
    from trackstar.catalog import Catalog

    catalog = Catalog(index)
    before = catalog.pointer()
    catalog.activate(generation)
    print(f"{generation} answers now, before it {before or 'none'}", file=sys.stderr)


def delete(
    index: IndexPath,
    documents: Annotated[list[str] | None, typer.Argument(help="Ids of documents, as the corpus has them.")] = None,
    file: Annotated[Path | None, typer.Option(help="File with an id on each line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say what is deleted as JSON.")] = False,
) -> None:
    """Delete documents: no answer shows them from now on; `index --purge` then takes them off the disk."""
    from trackstar.index import Index
    from trackstar.tombstones import delete_documents

    wanted = list(documents or [])
    if file is not None:
        if not file.is_file():
            raise NotFound(f"there is no file {str(file)!r}")
        wanted += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not wanted:
        raise InvalidRequest("name the documents to be deleted, or a --file of their ids")
    opened = Index(index)
    rows = opened.rows()
    deleted = delete_documents(opened.root, rows, wanted)
    rows.close()
    if as_json:
        print_json({"documents": sorted(set(deleted.doc_ids)), "passages": len(deleted.passage_ids)})
        return
    print(
        f"{len(set(deleted.doc_ids)):,} documents with {len(deleted.passage_ids):,} passages are deleted in all; "
        "running services follow within seconds",
        file=sys.stderr,
    )


def retire(
    index: IndexPath,
    generation: Annotated[str, typer.Argument(help="The generation that is no longer needed.")],
    undo: Annotated[bool, typer.Option("--undo", help="Bring it back, if nothing was collected yet.")] = False,
) -> None:
    """Have a generation served no more; its files go with the next `collect --apply`."""
    from trackstar.catalog import Catalog
    from trackstar.retirement import bring_back
    from trackstar.retirement import retire as retire_it

    (bring_back if undo else retire_it)(Catalog(index), generation)
    print(f"{generation} is {'back' if undo else 'retired'}", file=sys.stderr)


def collect(
    index: IndexPath,
    apply: Annotated[bool, typer.Option("--apply", help="Delete what is listed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="List as JSON.")] = False,
) -> None:
    """List what no generation needs: retired and unfinished ones, purged rows, old statistics; --apply deletes it."""
    from trackstar.catalog import Catalog
    from trackstar.retirement import collect as collect_it
    from trackstar.retirement import garbage

    catalog = Catalog(index)
    found = collect_it(catalog) if apply else garbage(catalog)
    total = sum(item.num_bytes for item in found)
    if as_json:
        items = [{"path": str(item.path), "bytes": item.num_bytes, "why": item.why} for item in found]
        print_json({"deleted": apply, "bytes": total, "items": items})
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("path", overflow="fold")
    table.add_column("bytes", justify="right")
    table.add_column("why", overflow="fold")
    for item in found:
        table.add_row(str(item.path.relative_to(index)), f"{item.num_bytes:,}", item.why)
    if found:
        Console().print(table)
    done = "were deleted" if apply else "would go with --apply"
    print(f"{len(found):,} files and folders, {total:,} bytes, {done}", file=sys.stderr)
