"""Which passages may be returned: by source, date, metadata or document, as a mask over all rows.

Contract: a filter's fields are joined by and, the values of one field by or. Sources, values and document ids are
compared whole. Dates are ISO 8601 dates or prefixes of one, both ends inclusive, and two of them are compared as far as
both are given: 2019 as a bound takes in all of that year, and a passage of 2019 passes a bound of 2019-05 on either
side, because it may. A passage without a date, or with anything but a date or a date and a time, passes no date bound.

`FilterIndex` reads the columns that a filter asks for shard by shard, a few shards at once, and asks about each
distinct value of a shard once. Columns whose values repeat are kept as small integers until `keep_bytes` are used up;
whatever is not kept is read anew for every filter that is not among the latest. It needs no torch.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest

_DATE = re.compile(r"[0-9]{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12][0-9]|3[01]))?)?")
# A time may follow the date of a passage.
_DATED = re.compile(rf"({_DATE.pattern})(?![^T ])")
_MASKS = 16
_KEEP_BYTES = 1 << 28
_SHARDS_AT_ONCE = 4
# Distinct metadata whose verdicts one evaluation remembers from shard to shard.
_VERDICTS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageFilter:
    """What a passage must have; an empty filter passes every passage.

    Raises:
        InvalidRequest: a date that is none, a first one behind the last, or a condition on metadata without a field or
            values; `field` says which.
    """

    sources: tuple[str, ...] = ()
    date_from: str | None = None
    date_until: str | None = None
    date_field: str = "date"
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    doc_ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, bound in (("date_from", self.date_from), ("date_until", self.date_until)):
            if bound is not None and not _DATE.fullmatch(bound):
                raise InvalidRequest(
                    f"{name}: {bound!r} is no date; give 2019, 2019-05 or 2019-05-30", field=f"filter.{name}"
                )
        if self.date_from and self.date_until and not _not_later(self.date_from, self.date_until):
            raise InvalidRequest(
                f"date_from: {self.date_from} lies behind date_until, {self.date_until}", field="filter.date_from"
            )
        if not self.date_field:
            raise InvalidRequest("date_field: it is empty; name the field of the date", field="filter.date_field")
        for name, values in self.metadata.items():
            if not name or not values:
                raise InvalidRequest(
                    f"metadata: the condition on {name!r} needs a field and at least one value", field="filter.metadata"
                )

    @property
    def is_empty(self) -> bool:
        """Whether every passage passes."""
        return not (self.sources or self.date_from or self.date_until or self.metadata or self.doc_ids)

    @property
    def key(self) -> str:
        """The same for equal filters."""
        return json.dumps(
            [
                sorted(set(self.sources)),
                [self.date_from, self.date_until, self.date_field],
                {name: sorted(set(values)) for name, values in sorted(self.metadata.items())},
                sorted(set(self.doc_ids)),
            ]
        )

    def matches(self, *, source: str, metadata: Mapping[str, str], doc_id: str) -> bool:
        """Whether one passage passes."""
        return (
            (not self.sources or source in self.sources)
            and (not self.doc_ids or doc_id in self.doc_ids)
            and self._accepts(metadata)
        )

    def passes_metadata(self, text: str) -> bool:
        """Whether a passage of this metadata, a JSON object, passes the conditions on metadata and date."""
        return self._accepts(json.loads(text))

    def _accepts(self, metadata: Mapping[str, str]) -> bool:
        return all(metadata.get(name) in values for name, values in self.metadata.items()) and self.passes_date(
            metadata.get(self.date_field)
        )

    def passes_date(self, date: str | None) -> bool:
        """Whether a passage of this date passes both bounds."""
        if self.date_from is None and self.date_until is None:
            return True
        found = None if date is None else _DATED.match(date)
        if found is None:
            return False
        day = found.group(1)
        return (self.date_from is None or _not_later(self.date_from, day)) and (
            self.date_until is None or _not_later(day, self.date_until)
        )


def _not_later(one: str, other: str) -> bool:
    """Whether a date can lie at or before another, as far as both are given."""
    shorter = min(len(one), len(other))
    return one[:shorter] <= other[:shorter]


class Columns(Protocol):
    """Columns of stored passages, shard by shard; `trackstar.rows.RowStore` has them."""

    @property
    def num_passages(self) -> int:
        """N."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""

    def shard_column(self, shard: int, name: str) -> pa.ChunkedArray:
        """One column of strings of one shard, in order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coded:
    """A column of one shard, unsigned integers [n] into its distinct values."""

    codes_n: NDArray[np.unsignedinteger[Any]]
    values: pa.Array

    @property
    def num_bytes(self) -> int:
        return self.codes_n.nbytes + int(self.values.nbytes)

    def mask(self, passes: Callable[[str], bool]) -> NDArray[np.bool_]:
        """Where the value passes; asked once for each distinct one."""
        table = np.fromiter(map(passes, self.values.to_pylist()), dtype=np.bool_, count=len(self.values))
        found: NDArray[np.bool_] = table[self.codes_n]
        return found


class FilterIndex:
    """Evaluates filters over stored passages; safe to use from several threads.

    Args:
        columns: where the passages are.
        keep_bytes: how much memory columns may take between filters.
    """

    def __init__(self, columns: Columns, *, keep_bytes: int = _KEEP_BYTES) -> None:
        self._columns = columns
        self._lock = Lock()
        self._room_bytes = keep_bytes
        self._kept: dict[tuple[int, str], _Coded] = {}
        # Packed, so that a mask takes a bit for each passage.
        self._masks: OrderedDict[str, tuple[NDArray[np.uint8], int]] = OrderedDict()

    def mask(self, wanted: PassageFilter) -> NDArray[np.bool_]:
        """Which passages pass, bool [N].

        Raises:
            CorruptArtifact, NotReady: what the columns raise.
        """
        key = wanted.key
        with self._lock:
            known = self._masks.get(key)
            if known is not None:
                self._masks.move_to_end(key)
        if known is None:
            mask_N = self._evaluate(wanted)
            known = np.packbits(mask_N), len(mask_N)
            with self._lock:
                self._masks[key] = known
                while len(self._masks) > _MASKS:
                    self._masks.popitem(last=False)
        packed, count = known
        found: NDArray[np.bool_] = np.unpackbits(packed, count=count).view(np.bool_)
        return found

    def _evaluate(self, wanted: PassageFilter) -> NDArray[np.bool_]:
        if wanted.is_empty:
            return np.ones(self._columns.num_passages, dtype=np.bool_)
        conditions: list[tuple[str, Callable[[str], bool]]] = []
        if wanted.sources:
            conditions.append(("source", frozenset(wanted.sources).__contains__))
        if wanted.doc_ids:
            conditions.append(("doc_id", frozenset(wanted.doc_ids).__contains__))
        if wanted.metadata or wanted.date_from or wanted.date_until:
            conditions.append(("metadata", lru_cache(maxsize=_VERDICTS)(wanted.passes_metadata)))

        def evaluate(shard: int) -> NDArray[np.bool_]:
            (name, passes), *others = conditions
            mask_n = self._coded(shard, name).mask(passes)
            for name, passes in others:
                if mask_n.any():
                    mask_n &= self._coded(shard, name).mask(passes)
            return mask_n

        with ThreadPoolExecutor(max_workers=_SHARDS_AT_ONCE, thread_name_prefix="filter") as threads:
            return np.concatenate([np.empty(0, np.bool_), *threads.map(evaluate, range(self._columns.num_shards))])

    def _coded(self, shard: int, name: str) -> _Coded:
        kept = self._kept.get((shard, name))
        if kept is not None:
            return kept
        encoded = self._columns.shard_column(shard, name).combine_chunks().dictionary_encode()
        small = np.min_scalar_type(max(0, len(encoded.dictionary) - 1))
        coded = _Coded(codes_n=encoded.indices.to_numpy().astype(small), values=encoded.dictionary)
        # Document ids hardly repeat: keeping them would leave no room for what does.
        if len(coded.values) <= max(1, len(coded.codes_n) // 2):
            with self._lock:
                if (shard, name) not in self._kept and coded.num_bytes <= self._room_bytes:
                    self._kept[shard, name] = coded
                    self._room_bytes -= coded.num_bytes
        return coded
