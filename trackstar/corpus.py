"""Reads a corpus as a stream of documents.

Contract: the good documents of a corpus come in one fixed order (paths as given, folders sorted, records as they stand
in the file) and are numbered from 0, so that `documents(start)` continues an interrupted run exactly, and
`documents_from` does so without reading what lies before. Memory does not grow with the corpus. Which files and formats
are read is told in `corpus_files`.

It does not tokenise, does not remove duplicates and does not change a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from trackstar.corpus_files import START, BadRecord, Mark, find_files, read_records
from trackstar.errors import InvalidRequest

_AUTOMATIC_IDS = ("id", "doc_id", "sentence_id")
_FINGERPRINT_BYTES = 1 << 20
_KEPT_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One good record of a corpus.

    `ordinal` is its position among the good documents, from 0. `doc_id` is the corpus's own id, or
    "<file>:<line or row number from 1>". `source` is the source field, or the file's name within the corpus.
    """

    ordinal: int
    doc_id: str
    text: str
    source: str
    metadata: dict[str, str]


class CorpusConfig(BaseModel):
    """What to read and which fields to take.

    paths: files, folders or fsspec URLs, in reading order.
    id_field: None takes the first of id, doc_id, sentence_id that a record has; a named field must be in every record.
    source_field, metadata_fields: a record without them gets the file's name, or goes without that entry.
    text_unit: what makes one document of a plain text file; paragraphs are parted by blank lines.
    skip_bad: count bad records and go on, instead of raising at the first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: tuple[str, ...]
    text_field: str = Field(default="text", min_length=1)
    id_field: str | None = None
    source_field: str | None = None
    metadata_fields: tuple[str, ...] = ()
    text_unit: Literal["line", "paragraph", "file"] = "line"
    skip_bad: bool = False


class Corpus:
    """The documents of the configured paths.

    Raises NotFound for a path that does not exist, InvalidRequest for one that holds no readable file, is of an unknown
    kind or reaches a file a second time. `bad_records` counts the bad records of the latest `documents` run so far.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.bad_records = 0
        self._bad_examples: list[str] = []
        self._ids = _AUTOMATIC_IDS if config.id_field is None else (config.id_field,)
        self._files = find_files(config.paths)

    @property
    def num_files(self) -> int:
        """Number of files, which are read in order."""
        return len(self._files)

    @property
    def bad_examples(self) -> tuple[str, ...]:
        """Sentences about the first bad records of the latest `documents` run, five at most."""
        return tuple(self._bad_examples)

    def fingerprint(self, *, whole: bool = False) -> str:
        """A hex digest of the fields taken and of every file's name, size, first and last MiB, or all bytes if `whole`.

        Unless `whole`, a change of equal length strictly inside a larger file is not seen. `skip_bad` is left out on
        purpose: the good documents keep their ordinals, so that a run stopped by a bad record can continue with it set.
        Raises InvalidRequest for a file that cannot be read any more.
        """
        digest = hashlib.sha256(self.config.model_dump_json(exclude={"paths", "skip_bad"}).encode())
        for file in self._files:
            try:
                with file.open() as stream:
                    size = stream.seek(0, 2)
                    digest.update(json.dumps([file.name, size]).encode())
                    step = _FINGERPRINT_BYTES
                    for offset in range(0, size, step) if whole else sorted({0, max(0, size - step)}):
                        stream.seek(offset)
                        digest.update(stream.read(step))
            except OSError as error:
                raise InvalidRequest(f"The corpus file {file.path} cannot be read: {error}.") from error
        return digest.hexdigest()

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Streams the good documents from ordinal `start` on; what lies before is still read and checked.

        Raises InvalidRequest, naming file and line or row: at a bad record (unless `skip_bad`), at a file that cannot
        be read to its end, at a table without the text column, and at the end of a corpus without any document.
        """
        self.bad_records = 0
        self._bad_examples.clear()
        return self._documents(start)

    def documents_from(self, file: int, mark: Mark, ordinal: int) -> Iterator[Document]:
        """Streams from a mark on, in that file and those behind it; the first good document gets the ordinal given.

        Raises as `documents`, except that there may be none.
        """
        for number in range(file, len(self._files)):
            for _, document in self.file_documents(number, mark if number == file else START, ordinal):
                yield document
                ordinal = document.ordinal + 1

    def file_documents(self, file: int, mark: Mark = START, ordinal: int = 0) -> Iterator[tuple[Mark, Document]]:
        """One file's good documents from a mark on, each with the mark in front of it; raises as `documents_from`."""
        config = self.config
        fields = (config.text_field, *self._ids, *filter(None, (config.source_field,)), *config.metadata_fields)
        found = self._files[file]
        for number, place, record in read_records(found, fields=fields, text_unit=config.text_unit, start=mark):
            try:
                if isinstance(record, BadRecord):
                    raise record
                document = self._document(record, found.name, number, ordinal)
            except BadRecord as bad:
                self._count_bad(f"{found.name}, {found.unit} {bad.number or number}: {bad}")
                continue
            yield place, document
            ordinal += 1

    def no_documents(self) -> InvalidRequest:
        """The error about a corpus in which every record is bad, or that has none."""
        cause = f": every record is bad, such as {self._bad_examples[0]}" if self._bad_examples else "."
        return InvalidRequest(f"The corpus {', '.join(self.config.paths)} holds no documents{cause}")

    def _documents(self, start: int) -> Iterator[Document]:
        document = None
        for document in self.documents_from(0, START, 0):
            if document.ordinal >= start:
                yield document
        if document is None:
            raise self.no_documents()

    def _document(self, record: Mapping[str, object], name: str, number: int, ordinal: int) -> Document:
        config = self.config
        if config.text_field not in record:
            raise BadRecord(f'the text field "{config.text_field}" is missing ({_fields(record)})')
        text = record[config.text_field]
        if not isinstance(text, str):
            raise BadRecord(f'the text field "{config.text_field}" is not a string but a {type(text).__name__}')
        if not text or text.isspace():
            raise BadRecord(f'the text field "{config.text_field}" is empty')
        ids = (record.get(field) for field in self._ids)
        doc_id = next((str(value) for value in ids if isinstance(value, str | int) and value != ""), None)
        if doc_id is None and config.id_field is not None:
            raise BadRecord(f'the id field "{config.id_field}" holds no string or whole number ({_fields(record)})')
        source = None if config.source_field is None else record.get(config.source_field)
        document = Document(
            ordinal=ordinal,
            doc_id=doc_id or f"{name}:{number}",
            text=text,
            source=name if source is None else _plain(source),
            metadata={key: _plain(record[key]) for key in config.metadata_fields if record.get(key) is not None},
        )
        try:
            for value in (text, document.doc_id, document.source, *document.metadata.values()):
                value.encode()
        except UnicodeEncodeError:
            # JSON may escape half a surrogate pair, which no tokenizer takes and no UTF-8 file can hold.
            raise BadRecord("a field holds half a surrogate pair, which is not Unicode text") from None
        return document

    def _count_bad(self, sentence: str) -> None:
        if not self.config.skip_bad:
            raise InvalidRequest(f"{sentence}; mend it, or leave bad records out with --skip-bad.") from None
        self.bad_records += 1
        if len(self._bad_examples) < _KEPT_EXAMPLES:
            self._bad_examples.append(f"{sentence}.")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _fields(record: Mapping[str, object]) -> str:
    return f"its fields are {', '.join(list(record)[:8])}" if record else "it has no fields"
