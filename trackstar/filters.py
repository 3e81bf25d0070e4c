"""Which passages may be returned: by source, date, metadata or document, as a mask over all rows.

Contract: a filter's fields are joined by and, the values of one field by or. Sources, values and document ids are
compared whole. Dates are ISO 8601 dates or prefixes of one, both ends inclusive: a passage's date passes `date_until`
if it is not later, compared as far as the bound is given (2019 passes all of that year); a passage without a date, or
with one that does not begin like a date, passes no date bound.

`FilterIndex` reads a shard's columns when a filter first asks for them and keeps them as one small integer a passage,
so memory grows by a few bytes for each passage and field that is asked about. It needs no torch.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest

_DATE = re.compile(r"\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?")
_MASKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PassageFilter:
    """What a passage must have; an empty filter passes every passage.

    Raises:
        InvalidRequest: a date that is none, or a condition on metadata without a field or values; `field` says which.
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
            and all(metadata.get(name) in values for name, values in self.metadata.items())
            and self.passes_date(metadata.get(self.date_field))
        )

    def passes_date(self, date: str | None) -> bool:
        """Whether a passage of this date passes both bounds."""
        if self.date_from is None and self.date_until is None:
            return True
        found = None if date is None else _DATE.match(date)
        if found is None:
            return False
        day = found.group()
        return (self.date_from is None or day[: len(self.date_from)] >= self.date_from[: len(day)]) and (
            self.date_until is None or day[: len(self.date_until)] <= self.date_until
        )


class Columns(Protocol):
    """Columns of stored passages; `trackstar.rows.RowStore` has them."""

    @property
    def num_passages(self) -> int:
        """N."""

    def column(self, name: str) -> NDArray[Any]:
        """One column [N] of all passages, in order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Coded:
    """A column of strings as int32 [N] into its distinct values."""

    codes_N: NDArray[np.int32]
    values: tuple[str, ...]

    def mask(self, passes: Callable[[str], bool]) -> NDArray[np.bool_]:
        """Where the value passes; asked once for each distinct one."""
        table = np.fromiter((passes(value) for value in self.values), dtype=np.bool_, count=len(self.values))
        found: NDArray[np.bool_] = table[self.codes_N]
        return found


class FilterIndex:
    """Evaluates filters over stored passages; safe to use from several threads."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._lock = Lock()
        self._coded: dict[str, _Coded] = {}
        # Packed, so that a mask takes a bit for each passage.
        self._masks: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()

    def mask(self, wanted: PassageFilter) -> NDArray[np.bool_]:
        """Which passages pass, bool [N]."""
        num = self._columns.num_passages
        with self._lock:
            packed = self._masks.get(wanted.key)
            if packed is None:
                packed = np.packbits(self._evaluate(wanted))
                self._masks[wanted.key] = packed
            self._masks.move_to_end(wanted.key)
            while len(self._masks) > _MASKS:
                self._masks.popitem(last=False)
        found: NDArray[np.bool_] = np.unpackbits(packed, count=num).view(np.bool_)
        return found

    def _evaluate(self, wanted: PassageFilter) -> NDArray[np.bool_]:
        mask_N = np.ones(self._columns.num_passages, dtype=np.bool_)
        if wanted.sources:
            mask_N &= self._column("source").mask(frozenset(wanted.sources).__contains__)
        if wanted.doc_ids:
            mask_N &= self._column("doc_id").mask(frozenset(wanted.doc_ids).__contains__)
        if wanted.metadata or wanted.date_from or wanted.date_until:

            def passes(text: str) -> bool:
                metadata = json.loads(text)
                return all(
                    metadata.get(name) in values for name, values in wanted.metadata.items()
                ) and wanted.passes_date(metadata.get(wanted.date_field))

            mask_N &= self._column("metadata").mask(passes)
        return mask_N

    def _column(self, name: str) -> _Coded:
        if name not in self._coded:
            numbers: dict[str, int] = {}
            codes_N = np.fromiter(
                (numbers.setdefault(value, len(numbers)) for value in self._columns.column(name)),
                dtype=np.int32,
                count=self._columns.num_passages,
            )
            self._coded[name] = _Coded(codes_N=codes_N, values=tuple(numbers))
        return self._coded[name]
