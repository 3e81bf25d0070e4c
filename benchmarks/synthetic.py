"""A corpus of any size, and cheap vectors in the place of gradient rows: inputs for runs in which no model takes part.

    document i    letters of family i mod F, of which some are drawn anew for i; so every passage has a few near ones
    row of it     sum over neighbouring tokens (a, b) of table[hash(a, b)],  table normal [B, d], B buckets

The first coordinates of the table are larger and a few directions are shared by all buckets, so that R has a spectrum
and whitening changes what is near to what. A row depends on its own tokens alone. Nothing is a Python loop per number.

Legend: N documents, T letters of each, d coordinates of a row, B buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trackstar.encode import Encoded, Example

LETTERS = 24
_ALTERED = 4  # one letter in so many is a document's own
_WRITTEN = 1 << 16
_ENCODED = 2048
_BUCKETS = 4096
_SHARED = 8


def write_corpus(folder: Path, num_documents: int, *, family: int, file_documents: int) -> None:
    """Write files of one-line JSON documents.

    Args:
        folder: made if it is not there.
        num_documents: N, at most 100 million.
        family: documents that are near to each other, spread evenly over the corpus.
        file_documents: of each file but the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_families = max(1, num_documents // family)
    for first in range(0, num_documents, file_documents):
        with (folder / f"{first // file_documents:06d}.jsonl").open("wb") as file:
            stop = min(num_documents, first + file_documents)
            for start in range(first, stop, _WRITTEN):
                file.write(_lines(np.arange(start, min(stop, start + _WRITTEN), dtype=np.uint64), num_families))


class TableEncoder:
    """A `PassageEncoder` that looks rows up.

    Args:
        dim: d.
        seed: of the table.
    """

    def __init__(self, dim: int, *, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        table_Bd = torch.randn(_BUCKETS, dim, generator=draw)
        table_Bd *= torch.linspace(2, 0.5, dim)
        shared_Bd = torch.randn(_BUCKETS, _SHARED, generator=draw) @ torch.randn(_SHARED, dim, generator=draw)
        self._table_Bd = table_Bd + shared_Bd

    def encode(self, examples: Sequence[Example], *, on_batch: Callable[[int], None] | None = None) -> Encoded:
        """See `PassageEncoder.encode`."""
        rows_ND = torch.empty(len(examples), self._table_Bd.shape[1])
        for start in range(0, len(examples), _ENCODED):
            tokens = [example.tokens for example in examples[start : start + _ENCODED]]
            rows_ND[start : start + len(tokens)] = self._rows(tokens)
            if on_batch is not None:
                on_batch(sum(map(len, tokens)))
        return Encoded(rows_ND=rows_ND, loss_N=torch.ones(len(examples)))

    def close(self) -> None:
        """Nothing is held."""

    def _rows(self, tokens: Sequence[NDArray[np.int32]]) -> torch.Tensor:
        lengths = np.array([len(some) for some in tokens], dtype=np.int64)
        flat = np.concatenate(tokens).astype(np.uint64)
        pairs = _mixed(flat[:-1] << np.uint64(32) | flat[1:]) % np.uint64(_BUCKETS)
        # The pair that begins with a passage's last token belongs to nobody.
        inside = np.ones(len(pairs), dtype=np.bool_)
        inside[np.cumsum(lengths)[:-1] - 1] = False
        starts = np.concatenate([[0], np.cumsum(np.maximum(lengths - 1, 0))[:-1]])
        return torch.nn.functional.embedding_bag(
            torch.from_numpy(pairs[inside].astype(np.int64)), self._table_Bd, torch.from_numpy(starts), mode="sum"
        )


def _lines(documents: NDArray[np.uint64], num_families: int) -> bytes:
    """JSON lines of some documents."""
    places = np.arange(LETTERS, dtype=np.uint64)
    families = documents % np.uint64(num_families)
    theirs = _mixed(families[:, None] * np.uint64(LETTERS) + places)
    own = _mixed((documents[:, None] * np.uint64(LETTERS) + places) ^ np.uint64(1 << 63))
    is_own = own % np.uint64(_ALTERED) == 0
    letters = np.where(is_own, own >> np.uint64(8), theirs >> np.uint64(8)) % np.uint64(26) + np.uint64(ord("a"))
    digits = documents[:, None] // 10 ** np.arange(7, -1, -1, dtype=np.uint64) % np.uint64(10) + np.uint64(ord("0"))
    parts = [
        _constant(b'{"id": "', len(documents)),
        digits.astype(np.uint8),
        _constant(b'", "text": "', len(documents)),
        letters.astype(np.uint8),
        _constant(b'"}\n', len(documents)),
    ]
    return np.concatenate(parts, axis=1).tobytes()


def _constant(text: bytes, times: int) -> NDArray[np.uint8]:
    return np.broadcast_to(np.frombuffer(text, dtype=np.uint8), (times, len(text)))


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: bits of the answer look independent of each other and of those of the argument."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return mixed ^ mixed >> np.uint64(31)
