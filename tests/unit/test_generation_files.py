"""Files of a generation: places among the passages that are left, as ids."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trackstar.generation_files import nth_kept


@given(num=st.integers(1, 60), data=st.data())
def test_places_among_those_left_are_their_ids(num: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, num - 1), max_size=num - 1))
    excluded = np.array(sorted(gone), dtype=np.int64)
    kept = np.setdiff1d(np.arange(num), excluded)
    assert nth_kept(excluded, np.arange(len(kept))).tolist() == kept.tolist()
