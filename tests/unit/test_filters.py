"""Masks against one passage after another; dates as a reader takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_rows import write
from trackstar.errors import InvalidRequest
from trackstar.filters import FilterIndex, PassageFilter
from trackstar.rows import RowStore

_DATES = st.sampled_from(["2018", "2019-05", "2019-05-30", "2019-05-30T10:00:00Z", "2020-01-02", "someday", ""])
_BOUNDS = st.sampled_from(
    [
        (None, None),
        (None, "2019-05"),
        ("2019", None),
        ("2018", "2019-05-29"),
        ("2019-05", "2019-05"),
        ("2019-05-30",) * 2,
    ]
)
_METADATA = st.fixed_dictionaries({}, optional={"date": _DATES, "language": st.sampled_from(["en", "de"])})
_PASSAGE = st.tuples(st.sampled_from(["web", "books"]), _METADATA, st.sampled_from(["a", "b", "c"]))


def make_filter(bounds: tuple[str | None, str | None], **others: Any) -> PassageFilter:
    return PassageFilter(date_from=bounds[0], date_until=bounds[1], **others)


_FILTER = st.builds(
    make_filter,
    _BOUNDS,
    sources=st.lists(st.sampled_from(["web", "books", "other"]), max_size=2).map(tuple),
    metadata=st.dictionaries(
        st.sampled_from(["language", "missing"]), st.lists(st.sampled_from(["en", "fr"]), min_size=1).map(tuple)
    ),
    doc_ids=st.lists(st.sampled_from(["a", "c"]), max_size=1).map(tuple),
)


Triple = tuple[str, dict[str, str], str]


class Stored:
    """Columns of passages in memory, in shards of three."""

    def __init__(self, passages: Sequence[Triple], size: int = 3) -> None:
        self._shards = [passages[first : first + size] for first in range(0, len(passages), size)]
        self.num_passages = len(passages)
        self.num_shards = len(self._shards)
        self.reads: list[tuple[int, str]] = []

    def shard_column(self, shard: int, name: str) -> pa.ChunkedArray:
        self.reads.append((shard, name))
        values = {
            "source": [source for source, _, _ in self._shards[shard]],
            "metadata": [json.dumps(metadata) for _, metadata, _ in self._shards[shard]],
            "doc_id": [doc_id for _, _, doc_id in self._shards[shard]],
        }[name]
        return pa.chunked_array([pa.array(part, pa.string()) for part in (values[:2], values[2:])])


def alone(passages: Sequence[Triple], wanted: PassageFilter) -> list[bool]:
    return [wanted.matches(source=source, metadata=metadata, doc_id=doc_id) for source, metadata, doc_id in passages]


@given(
    passages=st.lists(_PASSAGE, max_size=20), filters=st.lists(_FILTER, max_size=4), keep=st.sampled_from([0, 60, 9999])
)
def test_masks_are_what_every_passage_says_alone(
    passages: Sequence[Triple], filters: list[PassageFilter], keep: int
) -> None:
    index = FilterIndex(Stored(passages), keep_bytes=keep)
    for wanted in [*filters, *filters]:
        expected = alone(passages, wanted)
        assert index.mask(wanted).tolist() == expected
        if wanted.is_empty:
            assert all(expected)


@given(passage=_PASSAGE, wanted=_FILTER)
def test_the_key_tells_filters_apart_and_the_order_of_values_does_not(passage: Triple, wanted: PassageFilter) -> None:
    turned = PassageFilter(
        sources=wanted.sources[::-1],
        date_from=wanted.date_from,
        date_until=wanted.date_until,
        metadata={name: values[::-1] for name, values in reversed(list(wanted.metadata.items()))},
        doc_ids=wanted.doc_ids[::-1],
    )
    assert turned.key == wanted.key
    assert alone([passage], turned) == alone([passage], wanted)
    assert PassageFilter(doc_ids=wanted.sources, sources=wanted.doc_ids).key != wanted.key or not (
        wanted.sources or wanted.doc_ids
    )


def test_over_rows_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "rows")
    rows = RowStore(tmp_path / "rows")
    passages = rows.passages(range(rows.num_passages))
    for wanted in (
        PassageFilter(),
        PassageFilter(sources=("file-1.jsonl",)),
        PassageFilter(date_field="year", date_from="2000", date_until="2100"),
        PassageFilter(metadata={"b": ("é",)}, doc_ids=("doc-7", "doc-150", "doc-308")),
    ):
        expected = [wanted.matches(source=p.source, metadata=p.metadata, doc_id=p.doc_id) for p in passages]
        assert FilterIndex(rows).mask(wanted).tolist() == expected
        assert any(expected)
    rows.close()


@pytest.mark.parametrize(
    ("date", "date_from", "date_until", "passes"),
    [
        ("2019-05-30", "2019", "2019", True),
        ("2019-12-31", "2019", "2019", True),
        ("2020-01-01", "2019", "2019", False),
        ("2018-12-31", "2019", None, False),
        ("2019-05-30T23:00:00Z", "2019-05-30", "2019-05-30", True),
        ("2019-05-31", None, "2019-05-30", False),
        ("2019", "2019-05", None, True),  # may lie in May or later
        ("2019", None, "2019-05", True),  # may lie in May or before
        ("2018", "2019-05", None, False),
        (None, "2019", None, False),
        ("yesterday", None, "2019", False),
        ("20190530", "2019", None, False),
        ("2019 or so", "2019", None, True),
        ("2019-13-01", "2019", None, False),
        ("２０１９", "2019", None, False),
        ("", "2019", None, False),
        (None, None, None, True),
    ],
)
def test_dates(date: str | None, date_from: str | None, date_until: str | None, passes: bool) -> None:
    assert PassageFilter(date_from=date_from, date_until=date_until).passes_date(date) is passes


@pytest.mark.parametrize("bad", ["19", "2019-13", "2019-05-32", "2019-5", "May 2019", "2019-05-30T10:00"])
def test_what_is_no_date_is_refused_with_its_field(bad: str) -> None:
    with pytest.raises(InvalidRequest, match="date_until") as caught:
        PassageFilter(date_until=bad)
    assert caught.value.field == "filter.date_until"


def test_a_condition_without_values_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="language"):
        PassageFilter(metadata={"language": ()})


def test_a_first_date_behind_the_last_is_refused() -> None:
    PassageFilter(date_from="2019-05", date_until="2019")
    with pytest.raises(InvalidRequest, match="2020 lies behind date_until, 2019-05") as caught:
        PassageFilter(date_from="2020", date_until="2019-05")
    assert caught.value.field == "filter.date_from"
    with pytest.raises(InvalidRequest, match="date_field"):
        PassageFilter(date_from="2020", date_field="")


def test_columns_that_repeat_are_read_once_within_their_room_and_masks_are_kept_few() -> None:
    passages = [("web", {"language": "en"}, str(number)) for number in range(48)]
    stored = Stored(passages, size=8)
    index = FilterIndex(stored)
    for number in range(40):
        wanted = PassageFilter(doc_ids=(str(number),), sources=("web",))
        assert index.mask(wanted).sum() == 1
        assert index.mask(wanted).sum() == 1
    assert stored.reads.count((0, "source")) == 1
    assert stored.reads.count((0, "doc_id")) == 40
    assert len(index._masks) == 16
    roomless = FilterIndex(Stored(passages, size=8), keep_bytes=0)
    assert roomless.mask(PassageFilter(sources=("web",))).all()
    assert not roomless._kept


def test_what_one_column_rules_out_is_not_looked_up_in_the_next() -> None:
    web: Triple = ("web", {}, "a")
    books: Triple = ("books", {}, "a")
    stored = Stored([web] * 3 + [books] * 3)
    assert FilterIndex(stored).mask(PassageFilter(sources=("books",), doc_ids=("a",))).sum() == 3
    assert sorted(stored.reads) == [(0, "source"), (1, "doc_id"), (1, "source")]


def test_a_mask_is_the_callers_own() -> None:
    index = FilterIndex(Stored([("web", {}, "a")]))
    index.mask(PassageFilter())[:] = False
    assert index.mask(PassageFilter()).all()
