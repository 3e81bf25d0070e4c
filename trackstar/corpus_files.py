"""Finds the files of a corpus and reads the records in them, before anything is asked of a record.

Contract: files come in the order of the given paths, folders sorted, each file once and under its own name; records
come as they stand in the file, with their line or row number from 1. Read are JSON lines (.jsonl, .ndjson, .json),
Parquet, Arrow streams (.arrow) and plain text (.txt, .text, .md), each plain or as .gz or .zst; folders of these; and
folders written by `save_to_disk` of Hugging Face datasets, with or without splits. Any fsspec URL may stand for a path.
Within a folder, files of other kinds, hidden files and a dataset's README, LICENSE and dataset_infos.json are passed
over. One line, one batch of rows or, where the file is the text unit, one file is held in memory at a time.

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


class BadRecord(Exception):
    """Why a record is no document, worded to stand behind "<file>, line <number>: "; `number` corrects the line."""

    def __init__(self, reason: str, number: int | None = None) -> None:
        super().__init__(reason)
        self.number = number


_Numbered = tuple[int, Mapping[str, object] | BadRecord]


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
    file: CorpusFile, *, fields: Sequence[str], text_unit: Literal["line", "paragraph", "file"]
) -> Iterator[_Numbered]:
    """Streams (number, record or what is wrong with it); blank lines are no records.

    The first of `fields` is the text's. Of a table only these columns are read, and a table without the first is an
    InvalidRequest, as is a file that cannot be read to its end.
    """
    number = 0
    try:
        with file.open() as raw, closing(_decompress(raw, file.codec)) as stream:
            if file.format == "json":
                records = _json_records(stream)
            elif file.format == "text":
                records = _text_records(stream, fields[0], text_unit)
            elif file.format == "arrow":
                records = _rows(_arrow_batches(stream), file.name, fields)
            else:
                records = _rows(_parquet_batches(stream, file.codec, fields), file.name, fields)
            for number, record in records:
                yield number, record
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


def _json_records(stream: BinaryIO) -> Iterator[_Numbered]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield number, BadRecord(f"byte {error.start + 1} of the line is not valid UTF-8")
        except (ValueError, RecursionError) as error:
            yield number, BadRecord(f"the line is not one JSON object ({error})")
        else:
            good = isinstance(record, dict)
            yield number, record if good else BadRecord(f"the line is not a JSON object but a {type(record).__name__}")


def _text_records(stream: BinaryIO, field: str, unit: Literal["line", "paragraph", "file"]) -> Iterator[_Numbered]:
    for first, lines in _text_units(stream, unit):
        try:
            text = lines.decode("utf-8-sig" if first == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield first, BadRecord("the line is not valid UTF-8", first + lines.count(b"\n", 0, error.start))
        else:
            if text and not text.isspace():
                yield first, {field: text}


def _text_units(stream: BinaryIO, unit: Literal["line", "paragraph", "file"]) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, bytes) of each line, each run of lines without a blank one, or the whole file."""
    held: list[bytes] = []
    first = 1
    for number, line in enumerate(stream, start=1):
        blank = unit != "file" and not line.strip()
        if held and (blank or unit == "line"):
            yield first, b"".join(held)
            held = []
        if not blank:
            first = first if held else number
            held.append(line)
    if held:
        yield first, b"".join(held)


def _parquet_batches(stream: BinaryIO, codec: str | None, fields: Sequence[str]) -> Iterator[Any]:
    with tempfile.TemporaryFile() as scratch:
        if codec is not None:  # Parquet is read from its end, which a compressed stream cannot do
            shutil.copyfileobj(stream, scratch, _BUFFER_BYTES)
        source = stream if codec is None else scratch
        # With a buffer and no reading ahead, a column comes piece by piece instead of a whole row group's at once.
        with pq.ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            names = table.schema_arrow.names
            columns = [name for name in names if name in fields]
            yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=columns if fields[0] in columns else names)


def _arrow_batches(stream: BinaryIO) -> Iterator[Any]:
    with pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            # A writer may have put everything in one batch; sliced, only so many rows become Python objects at a time.
            for row in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(row, _BATCH_ROWS)


def _rows(batches: Iterator[Any], name: str, fields: Sequence[str]) -> Iterator[_Numbered]:
    number = 0
    for batch in batches:
        columns = batch.schema.names
        if fields[0] not in columns:
            raise InvalidRequest(
                f'The corpus file {name} has no column "{fields[0]}" but {", ".join(columns)}; name the text field.'
            )
        wanted = batch.select([column for column in columns if column in fields])
        try:
            rows = wanted.to_pylist()
        except UnicodeDecodeError:
            rows = [_row(wanted.slice(row, 1)) for row in range(wanted.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _row(batch: Any) -> Mapping[str, object] | BadRecord:
    try:
        return cast(Mapping[str, object], batch.to_pylist()[0])
    except UnicodeDecodeError:
        return BadRecord("a field of the row is not valid UTF-8")


def _expand(path: str) -> list[tuple[Any, str, str]]:
    """(file system, folder that names may be relative to, file) for each file that `path` stands for."""
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isfile(root):
            return [(filesystem, posixpath.dirname(root), root)]
        if not filesystem.isdir(root):
            raise NotFound(f"The corpus path {path} does not exist; check its spelling.")
        found = [(filesystem, root, file) for file in _walk(filesystem, root)]
    except (ValueError, ImportError, OSError) as error:
        raise InvalidRequest(f"The corpus path {path} cannot be opened: {error}.") from error
    if not found:
        raise InvalidRequest(f"The corpus folder {path} holds no readable file; readable are {_READABLE}.")
    return found


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
