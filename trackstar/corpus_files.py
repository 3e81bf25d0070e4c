"""Finds the files of a corpus and reads the records in them, before anything is asked of a record.

Contract: files come in the order of the given paths, folders sorted, each file once and under its own name; records
come as they stand in the file, with their line or row number from 1 and with a mark from which reading can go on. Read
are JSON lines (.jsonl, .ndjson, .json), Parquet, Arrow streams (.arrow) and plain text (.txt, .text, .md), each plain
or as .gz or .zst; folders of these; and folders written by `save_to_disk` of Hugging Face datasets, with or without
splits. Any fsspec URL may stand for a path. Within a folder, files of other kinds, hidden files and a dataset's README,
LICENSE and dataset_infos.json are passed over. One line, one batch of rows or, where the file is the text unit, one
file is held in memory at a time.

It does not know which records are good documents, except that a unit of text is not blank.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from trackstar.errors import InvalidRequest, NotFound
from trackstar.object_store import OBSTORE_SCHEMES, open_filesystem, refused, store_errors

_Format = Literal["json", "parquet", "arrow", "text"]
_FORMATS: dict[str, _Format] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **{".parquet": "parquet", ".arrow": "arrow"},
}
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_READABLE = f"{', '.join(_FORMATS)}, each plain or with .gz or .zst behind"
_BUFFER_BYTES = 1 << 20
_BATCH_ROWS = 256
# Longest wait for one answer of an object store.
_STORE_SECONDS = 60.0


class BadRecord(Exception):
    """Why a record is no document, worded to stand behind "<file>, line <number>: "; `number` corrects the line."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A place in a file, in front of a record: how many lines or rows lie before it, and of lines how many bytes.

    Bytes count in the decompressed stream.
    """

    number: int = 0
    offset: int = 0


START = Mark()
# Line or row number, where it stands, and the record or what is wrong with it.
_Numbered = tuple[int, Mark, Mapping[str, object] | BadRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFile:
    """One file: `path` as its file system takes it, `name` within the corpus, `codec` its compression if any."""

    filesystem: Any  # fsspec has no types
    path: str
    name: str
    format: _Format
    codec: str | None

    @property
    def unit(self) -> str:
        """What the numbers of its records count."""
        return "line" if self.format in ("json", "text") else "row"

    def open(self) -> BinaryIO:
        """The stored bytes, not decompressed."""
        return cast(BinaryIO, self.filesystem.open(self.path, "rb"))


def find_files(paths: Sequence[str]) -> tuple[CorpusFile, ...]:
    """All files that the paths stand for, named relative to the closest folder that holds all paths.

    Raises NotFound for a path that does not exist, InvalidRequest for no path, an unknown kind of file, a folder
    without a readable file, and a file reached twice.
    """
    if not paths:
        raise InvalidRequest("No corpus path is given; name at least one file, folder or URL.")
    found = [entry for path in paths for entry in _expand(path)]
    bases = [filesystem.unstrip_protocol(base).rstrip("/").split("/") for filesystem, base, _ in found]
    shared = len(os.path.commonprefix(bases))  # noqa: RUF071 - of lists of folder names, not of strings
    files: dict[str, CorpusFile] = {}
    for filesystem, _, path in found:
        name = "/".join(filesystem.unstrip_protocol(path).split("/")[shared:])
        kind, codec = _kind(path)
        if kind is None:
            raise InvalidRequest(f"The corpus file {path} is of an unknown kind; readable are {_READABLE}.")
        if name in files:
            raise InvalidRequest(f"The corpus paths reach the file {path} twice; name each file once.")
        files[name] = CorpusFile(filesystem=filesystem, path=path, name=name, format=kind, codec=codec)
    return tuple(files.values())


def read_records(
    file: CorpusFile,
    *,
    fields: Sequence[str],
    text_unit: Literal["line", "paragraph", "file"],
    start: Mark = START,
) -> Iterator[_Numbered]:
    """Streams (number, mark in front of it, record or what is wrong with it) from `start` on; blank lines are none.

    The first of `fields` is the text's. Of a table only these columns are read, and a table without the first is an
    InvalidRequest, as is a file that cannot be read to its end.
    """
    number = 0
    try:
        with file.open() as raw, closing(_decompress(raw, file.codec)) as stream:
            if file.format in ("json", "text"):
                _skip(stream, start.offset, seekable=file.codec is None)
            if file.format == "json":
                records = _json_records(stream, start)
            elif file.format == "text":
                records = _text_records(stream, fields[0], text_unit, start)
            elif file.format == "arrow":
                records = _rows(_arrow_batches(stream), file.name, fields, start)
            else:
                records = _rows(_parquet_batches(stream, file.codec, fields, start.number), file.name, fields, start)
            for number, mark, record in records:
                yield number, mark, record
    except store_errors() as error:
        raise refused(f"the corpus file {file.name}", error) from None
    except (OSError, EOFError, pa.ArrowException) as error:
        where = f"after {file.unit} {number}" if number else "at its start"
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise InvalidRequest(f"The corpus file {file.name} cannot be read {where} ({reason}); replace it.") from error


def _decompress(raw: BinaryIO, codec: str | None) -> BinaryIO:
    # Not fsspec's own decompression: that takes the end of the first zstd frame, or a cut, for the end of the file.
    if codec is None:
        return raw
    stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
    return cast(BinaryIO, io.BufferedReader(stream, _BUFFER_BYTES))


def _skip(stream: BinaryIO, offset: int, *, seekable: bool) -> None:
    if seekable:
        stream.seek(offset)
        return
    while offset > 0 and (passed := len(stream.read(min(offset, _BUFFER_BYTES)))):
        offset -= passed


def _json_records(stream: BinaryIO, start: Mark) -> Iterator[_Numbered]:
    offset = start.offset
    for number, line in enumerate(stream, start=start.number + 1):
        mark = Mark(number=number - 1, offset=offset)
        offset += len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield number, mark, BadRecord(f"byte {error.start + 1} of the line is not valid UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, mark, BadRecord(f"the line is not one JSON object ({error})")
        else:
            bad = BadRecord(f"the line is not a JSON object but a {type(record).__name__}")
            yield number, mark, record if isinstance(record, dict) else bad


def _text_records(
    stream: BinaryIO, field: str, unit: Literal["line", "paragraph", "file"], start: Mark
) -> Iterator[_Numbered]:
    for first, offset, lines in _text_units(stream, unit, start):
        mark = Mark(number=first - 1, offset=offset)
        try:
            text = lines.decode("utf-8-sig" if first == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            number = first + lines.count(b"\n", 0, error.start)
            yield first, mark, BadRecord("the line is not valid UTF-8", number)
        else:
            if text and not text.isspace():
                yield first, mark, {field: text}


def _text_units(
    stream: BinaryIO, unit: Literal["line", "paragraph", "file"], start: Mark
) -> Iterator[tuple[int, int, bytes]]:
    """(number of its first line, its offset, bytes) of each line, each run of lines without a blank one, or all."""
    held: list[bytes] = []
    first, first_offset, offset = start.number + 1, start.offset, start.offset
    for number, line in enumerate(stream, start=start.number + 1):
        blank = unit != "file" and not line.strip()
        if held and (blank or unit == "line"):
            yield first, first_offset, b"".join(held)
            held = []
        if not blank:
            first, first_offset = (first, first_offset) if held else (number, offset)
            held.append(line)
        offset += len(line)
    if held:
        yield first, first_offset, b"".join(held)


def _parquet_batches(
    stream: BinaryIO, codec: str | None, fields: Sequence[str], skip: int
) -> Iterator[tuple[int, Any]]:
    """(rows before it, batch) from the row group on that holds row `skip`."""
    with tempfile.TemporaryFile() as scratch:
        if codec is not None:  # Parquet is read from its end, which a compressed stream cannot do
            shutil.copyfileobj(stream, scratch, _BUFFER_BYTES)
        source = stream if codec is None else scratch
        # With a buffer and no reading ahead, a column comes piece by piece instead of a whole row group's at once.
        with pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in fields]
            passed, group = 0, 0
            while group < table.num_row_groups and passed + table.metadata.row_group(group).num_rows <= skip:
                passed += table.metadata.row_group(group).num_rows
                group += 1
            groups = range(group, table.num_row_groups)
            wanted = columns if fields[0] in columns else names
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, row_groups=groups, columns=wanted):
                yield passed, batch
                passed += batch.num_rows


def _arrow_batches(stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(rows before it, batch)."""
    passed = 0
    with pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            # A writer may have put everything in one batch; sliced, only so many rows become Python objects at a time.
            for row in range(0, batch.num_rows, _BATCH_ROWS):
                yield passed + row, batch.slice(row, _BATCH_ROWS)
            passed += batch.num_rows


def _rows(batches: Iterator[tuple[int, Any]], name: str, fields: Sequence[str], start: Mark) -> Iterator[_Numbered]:
    for number, batch in batches:
        columns = batch.schema.names
        if fields[0] not in columns:
            raise InvalidRequest(
                f'The corpus file {name} has no column "{fields[0]}" but {", ".join(columns)}; name the text field.'
            )
        passed = min(batch.num_rows, max(0, start.number - number))
        wanted = batch.select([column for column in columns if column in fields]).slice(passed)
        try:
            rows = wanted.to_pylist()
        except UnicodeDecodeError:
            rows = [_row(wanted.slice(row, 1)) for row in range(wanted.num_rows)]
        for row, record in enumerate(rows, start=number + passed):
            yield row + 1, Mark(number=row), record


def _row(batch: Any) -> Mapping[str, object] | BadRecord:
    try:
        return cast(Mapping[str, object], batch.to_pylist()[0])
    except UnicodeDecodeError:
        return BadRecord("a field of the row is not valid UTF-8")


def _expand(path: str) -> list[tuple[Any, str, str]]:
    """(file system, folder that names may be relative to, file) for each file that `path` stands for."""
    try:
        filesystem, root = _file_system(path)
        if filesystem.isfile(root):
            return [(filesystem, posixpath.dirname(root), root)]
        if not filesystem.isdir(root):
            raise NotFound(f"The corpus path {path} does not exist; check its spelling.")
        found = [(filesystem, root, file) for file in _walk(filesystem, root)]
    except store_errors() as error:
        raise refused(f"the corpus path {path}", error) from None
    except (ValueError, ImportError, OSError) as error:
        raise InvalidRequest(f"The corpus path {path} cannot be opened: {error}.") from error
    if not found:
        raise InvalidRequest(f"The corpus folder {path} holds no readable file; readable are {_READABLE}.")
    return found


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of a path or URL, and what it calls it; object stores as the index's own are opened."""
    scheme, colon, _ = path.partition("://")
    if not colon or "::" in path or scheme not in OBSTORE_SCHEMES:
        filesystem, root = fsspec.core.url_to_fs(path)
        return filesystem, root
    filesystem = open_filesystem(scheme, _STORE_SECONDS, {})
    return filesystem, filesystem._strip_protocol(path)


def _walk(filesystem: Any, folder: str) -> Iterator[str]:
    """The readable files under a folder in sorted order; a saved Hugging Face dataset gives its tables only."""
    entries = {posixpath.basename(path.rstrip("/")): path for path in filesystem.ls(folder, detail=False)}
    if "dataset_dict.json" in entries:
        for split in _saved(filesystem, entries["dataset_dict.json"], "splits"):
            yield from _walk(filesystem, posixpath.join(folder, split))
        return
    if {"dataset_info.json", "state.json"} <= entries.keys():
        for table in _saved(filesystem, entries["state.json"], "_data_files"):
            yield posixpath.join(folder, table["filename"])
        return
    for name, path in sorted(entries.items()):
        if name.startswith((".", "_")) or name == "dataset_infos.json" or name.split(".")[0] in ("README", "LICENSE"):
            continue
        if filesystem.isdir(path):
            if os.path.islink(path) and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(path)}/"):
                raise InvalidRequest(f"The corpus folder {path} is a link to a folder that holds it; remove the link.")
            yield from _walk(filesystem, path)
        elif _kind(name)[0] is not None:
            yield path


def _saved(filesystem: Any, path: str, key: str) -> Any:
    try:
        return json.loads(filesystem.cat_file(path))[key]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f'The dataset file {path} holds no "{key}"; save the dataset again.') from error


def _kind(path: str) -> tuple[_Format | None, str | None]:
    stem, extension = posixpath.splitext(path.lower())
    codec = _CODECS.get(extension)
    return _FORMATS.get(extension if codec is None else posixpath.splitext(stem)[1]), codec
