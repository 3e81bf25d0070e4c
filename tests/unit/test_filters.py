"""Masks against one passage after another; dates as a reader takes them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.filters import FilterIndex, PassageFilter

_DATES = st.sampled_from(["2018", "2019-05", "2019-05-30", "2019-05-30T10:00:00Z", "2020-01-02", "someday", ""])
_BOUNDS = st.none() | st.sampled_from(["2018", "2019", "2019-05", "2019-05-29", "2019-05-30", "2020-01"])
_METADATA = st.fixed_dictionaries({}, optional={"date": _DATES, "language": st.sampled_from(["en", "de"])})
_PASSAGE = st.tuples(st.sampled_from(["web", "books"]), _METADATA, st.sampled_from(["a", "b", "c"]))
_FILTER = st.builds(
    PassageFilter,
    sources=st.lists(st.sampled_from(["web", "books", "other"]), max_size=2).map(tuple),
    date_from=_BOUNDS,
    date_until=_BOUNDS,
    metadata=st.dictionaries(
        st.sampled_from(["language", "missing"]), st.lists(st.sampled_from(["en", "fr"]), min_size=1).map(tuple)
    ),
    doc_ids=st.lists(st.sampled_from(["a", "c"]), max_size=1).map(tuple),
)


class Stored:
    """Columns of passages in memory."""

    def __init__(self, passages: list[tuple[str, dict[str, str], str]]) -> None:
        self._columns: dict[str, list[str]] = {
            "source": [source for source, _, _ in passages],
            "metadata": [json.dumps(metadata) for _, metadata, _ in passages],
            "doc_id": [doc_id for _, _, doc_id in passages],
        }
        self.num_passages = len(passages)
        self.reads: list[str] = []

    def column(self, name: str) -> NDArray[Any]:
        self.reads.append(name)
        return np.array(self._columns[name], dtype=object)


@given(passages=st.lists(_PASSAGE, max_size=20), wanted=_FILTER)
def test_a_mask_is_what_every_passage_says_alone(
    passages: list[tuple[str, dict[str, str], str]], wanted: PassageFilter
) -> None:
    index = FilterIndex(Stored(passages))
    expected = [
        wanted.matches(source=source, metadata=metadata, doc_id=doc_id) for source, metadata, doc_id in passages
    ]
    assert index.mask(wanted).tolist() == expected
    assert index.mask(wanted).tolist() == expected
    if wanted.is_empty:
        assert all(expected)


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


def test_columns_are_read_once_and_masks_are_kept_few() -> None:
    stored = Stored([("web", {"language": "en"}, str(number)) for number in range(50)])
    index = FilterIndex(stored)
    for number in range(40):
        assert index.mask(PassageFilter(doc_ids=(str(number),), sources=("web",))).sum() == 1
    assert stored.reads == ["source", "doc_id"]
    assert len(index._masks) == 16
