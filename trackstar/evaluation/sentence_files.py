"""A corpus in files: made in one pass over it, read back without holding it, however large it is.

    FOLDER/sentences.arrow   ids, texts and annotations in order, as Arrow has them on disk: they are mapped, not loaded
    FOLDER/hashes.bin        a 64-bit hash of every id, ascending, uint64 [N]
    FOLDER/positions.bin     the positions that go with them, int64 [N]
    FOLDER/receipt.json      digest of the corpus's files and fields, and of what was read; written last

Contract: the same corpus gives the same bytes, and the same digest as `Sentences.of`. Files are taken from before if no
byte of the corpus's own has changed. Memory is bounded by a batch of documents, and by the ids of one part in 256,
which are sorted at once. An id is looked up by its hash and compared itself, so that equal hashes do no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trackstar.corpus import Corpus, CorpusConfig
from trackstar.errors import CorruptArtifact, NotFound
from trackstar.evaluation.sentences import TRIPLES, Sentences, annotated, counted, twice
from trackstar.storage import digest_of, publish_json, read_json

FORMAT = 1
# A batch is full at either bound.
_BATCH_SENTENCES, _BATCH_CHARACTERS = 1 << 14, 1 << 23
# Parts of the ids, by the first byte of their hash.
_PARTS = 256
_ENTRY = np.dtype([("hash", "<u8"), ("position", "<i8")])
_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("triples", pa.string())])
_NAMES = ("sentences.arrow", "hashes.bin", "positions.bin")


def stored_sentences(config: CorpusConfig, folder: Path) -> Sentences:
    """The sentences of a corpus, in files of a folder; made there if they are not yet.

    Raises:
        InvalidRequest: two documents have the same id, or as `Corpus`.
        NotFound: a path does not exist.
        CorruptArtifact: a file is not as long as it was written.
    """
    corpus = annotated(config)
    key = digest_of([FORMAT, corpus.fingerprint(whole=True), config.skip_bad])
    receipt_path = folder / "receipt.json"
    receipt = read_json(receipt_path) if receipt_path.is_file() else {}
    if receipt.get("corpus") != key:
        receipt_path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        # Made aside, so that a reader of the files as they were keeps them.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as aside:
            digest = _write(corpus, Path(aside))
            sizes = {name: (Path(aside) / name).stat().st_size for name in _NAMES}
            for name in _NAMES:
                (Path(aside) / name).replace(folder / name)
        receipt = {"corpus": key, "digest": digest, "sizes": sizes}
        publish_json(receipt_path, receipt)
    for name, size in receipt["sizes"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise CorruptArtifact(f"{str(folder / name)!r} is not what was written; delete its folder and run again")
    table = _mapped(folder / _NAMES[0])
    ids = TextColumn(table.column("id"))
    hashes_N = np.memmap(folder / _NAMES[1], dtype="<u8", mode="r")
    positions_N = np.memmap(folder / _NAMES[2], dtype="<i8", mode="r")
    return Sentences(
        ids=ids,
        texts=TextColumn(table.column("text")),
        triples=TextColumn(table.column("triples")),
        digest=receipt["digest"],
        positions=Positions(ids, hashes_N, positions_N),
    )


class TextColumn(Sequence[str]):
    """Texts as Arrow holds them; each becomes a Python text when it is asked for."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        for chunk in self._values.chunks:
            yield from chunk.to_pylist()

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            found: Sequence[str] = self._values.slice(start, max(0, stop - start)).to_pylist()
            return found[::step]
        text: str = self._values[int(place)].as_py()
        return text


class Positions(Mapping[str, int]):
    """Positions by id.

    Args:
        ids: by position.
        hashes_N: of the ids, ascending.
        positions_N: the position of each hash's id.
    """

    def __init__(self, ids: Sequence[str], hashes_N: NDArray[np.uint64], positions_N: NDArray[np.int64]) -> None:
        self._ids = ids
        self._hashes_N = hashes_N
        self._positions_N = positions_N

    def __getitem__(self, sentence_id: str) -> int:
        wanted = _hash(sentence_id)
        place = int(np.searchsorted(self._hashes_N, np.uint64(wanted)))
        while place < len(self._hashes_N) and int(self._hashes_N[place]) == wanted:
            position = int(self._positions_N[place])
            if self._ids[position] == sentence_id:
                return position
            place += 1
        raise KeyError(sentence_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def _write(corpus: Corpus, folder: Path) -> str:
    """All files but the receipt; returns the sentences' digest."""
    digest = hashlib.sha256()
    count = 0
    with contextlib.ExitStack() as held:
        parts = [held.enter_context((folder / f"part-{part:03}").open("wb")) for part in range(_PARTS)]
        sink = held.enter_context(pa.OSFile(str(folder / _NAMES[0]), "wb"))
        writer = held.enter_context(pa.ipc.new_file(sink, _SCHEMA))
        for ids, texts, triples in _batches(corpus):
            writer.write_batch(pa.record_batch([ids, texts, triples], schema=_SCHEMA))
            for record in zip(ids, texts, triples, strict=True):
                for part in record:
                    digest.update(counted(part))
            entries = np.empty(len(ids), dtype=_ENTRY)
            entries["hash"] = [_hash(sentence_id) for sentence_id in ids]
            entries["position"] = np.arange(count, count + len(ids))
            first_bytes = entries["hash"] >> np.uint64(56)
            for part_number in np.unique(first_bytes).tolist():
                parts[part_number].write(entries[first_bytes == part_number].tobytes())
            count += len(ids)
    _sort_ids(folder)
    return digest.hexdigest()


def _sort_ids(folder: Path) -> None:
    """The two files of hashes and positions, from the parts, which are removed."""
    ids = TextColumn(_mapped(folder / _NAMES[0]).column("id"))
    repeated: list[tuple[int, int]] = []
    with (folder / _NAMES[1]).open("wb") as hashes, (folder / _NAMES[2]).open("wb") as positions:
        for part in range(_PARTS):
            path = folder / f"part-{part:03}"
            entries = np.fromfile(path, dtype=_ENTRY)
            path.unlink()
            entries = entries[np.argsort(entries["hash"], kind="stable")]
            hashes.write(entries["hash"].tobytes())
            positions.write(entries["position"].tobytes())
            repeated += _repeated(entries, ids)
    if repeated:
        second, first = min(repeated)
        raise twice(ids[second], first, second)


def _repeated(entries: NDArray[Any], ids: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(second, first) position of ids that occur again, from entries sorted by hash, then by position."""
    _, starts, counts = np.unique(entries["hash"], return_index=True, return_counts=True)
    for start, count in zip(starts[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        seen: dict[str, int] = {}
        for position in entries["position"][start : start + count].tolist():
            if (first := seen.setdefault(ids[position], position)) != position:
                yield position, first


def _batches(corpus: Corpus) -> Iterator[tuple[list[str], list[str], list[str]]]:
    ids: list[str] = []
    texts: list[str] = []
    triples: list[str] = []
    characters = 0
    for document in corpus.documents():
        ids.append(document.doc_id)
        texts.append(document.text)
        triples.append(document.metadata.get(TRIPLES, ""))
        characters += len(document.text)
        if len(ids) == _BATCH_SENTENCES or characters >= _BATCH_CHARACTERS:
            yield ids, texts, triples
            ids, texts, triples, characters = [], [], [], 0
    if ids:
        yield ids, texts, triples


def _mapped(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except FileNotFoundError as error:
        raise NotFound(f"there is no {str(path)!r}") from error
    except pa.ArrowInvalid as error:
        raise CorruptArtifact(f"{str(path)!r} is not what was written; delete its folder and run again") from error


def _hash(sentence_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sentence_id.encode(), digest_size=8).digest(), "little")
