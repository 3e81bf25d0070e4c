"""Bootstrap intervals of means over queries.

A resample draws as many queries as there are, with replacement; the interval runs between the 2.5 and 97.5 percentiles
of the resamples' means. Draws depend on the seed and the number of queries alone, so methods that are compared on the
same queries are resampled alike, and the same command gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Draws that are held at once.
_MAX_DRAWN = 1 << 22

# "mean", "low" and "high".
Numbers = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals are made: `resamples` draws, from `seed`; `level` is the share of them that an interval holds."""

    seed: int = 0
    resamples: int = 2000
    level: float = 0.95

    def means(self, values_QM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean of every resample, float64 [resamples, M], of values [Q, M]."""
        counts = list(self._counts(len(values_QM)))
        return np.concatenate([part @ values_QM for part in counts]) / len(values_QM)

    def numbers(self, values_Q: NDArray[np.float64]) -> Numbers:
        """The mean of values [Q] and its interval."""
        (low,), (high,) = self.interval(values_Q[:, None])
        return {"mean": float(values_Q.mean()), "low": float(low), "high": float(high)}

    def statistic(self, of: Callable[[NDArray[np.int64]], float], num: int) -> Numbers:
        """A statistic of `num` things, of which it is given the numbers, some several times, and its interval."""
        drawn = (np.repeat(np.arange(num), counts.astype(np.int64)) for part in self._counts(num) for counts in part)
        low, high = np.percentile([of(numbers) for numbers in drawn], self._tails).tolist()
        return {"mean": of(np.arange(num)), "low": low, "high": high}

    def interval(self, values_QM: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lower and upper end for every column, float64 [2, M]."""
        ends: NDArray[np.float64] = np.percentile(self.means(values_QM), self._tails, axis=0)
        # Sums of counts times values round differently from the mean itself; an interval holds equal values exactly.
        low, high = values_QM.min(axis=0), values_QM.max(axis=0)
        return np.clip(ends, low, high)

    @property
    def _tails(self) -> list[float]:
        tail = 50.0 * (1.0 - self.level)
        return [tail, 100.0 - tail]

    def _counts(self, num: int) -> Iterator[NDArray[np.float64]]:
        """How often every query is drawn, float64 [r, num], for r resamples at a time."""
        generator = np.random.default_rng(self.seed)
        step = max(1, _MAX_DRAWN // num)
        for first in range(0, self.resamples, step):
            rows = min(step, self.resamples - first)
            drawn = generator.integers(0, num, (rows, num)) + np.arange(rows)[:, None] * num
            yield np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(np.float64)
