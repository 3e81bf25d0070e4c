"""Do a method's scores predict what retraining without passages does? The linear datamodeling score, and removals.

    LDS(method) = mean over queries q of  Spearman over subsets S of ( sum of score(m, q) over m in S,  -loss_S(q) )
    rise(method, k) = mean over queries q of  loss_(all but q's first k)(q) - loss_all(q)

loss_S is the query's loss under a model retrained on subset S alone (`retraining`), so nothing here shares the geometry
of gradients, projections or an optimizer state with any method. A method whose scores of a query do not tell subsets
apart (all zero, as of a lexical method that shares no word) correlates with nothing: 0.

Queries are resampled for an interval of the mean over queries. All queries share the same subsets, so that interval
says nothing of what other subsets would have given; a second one resamples the subsets. Both keep the other fixed.

Legend: N passages, n of them at once, Q queries, S subsets, R runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trackstar.errors import InvalidRequest
from trackstar.evaluation.intervals import Bootstrap, Numbers
from trackstar.evaluation.tail_patch_judge import Lists

# Scores float32 [Q, N] of all passages, or pieces of them: the first passage's number and scores [Q, n].
AllScores = NDArray[np.float32] | Iterable[tuple[int, NDArray[np.float32]]]
DEFAULT_BOOTSTRAP = Bootstrap(resamples=1000)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DatamodelingScore:
    """LDS of one method: values float64 [Q], their mean with its interval over queries, and that over subsets."""

    values_Q: NDArray[np.float64]
    over_queries: Numbers
    over_subsets: Numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Removal:
    """Runs that leave a method's first passages out: one for each group of neighbouring queries.

    kept: numbers of the passages that each run keeps. run_Q: the run of each query, int64 [Q]. num_removed: passages
    that a run leaves out, on average.
    """

    kept: tuple[tuple[int, ...], ...]
    run_Q: NDArray[np.int64]
    num_removed: float


def draw_subsets(num_passages: int, *, count: int, fraction: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Random subsets of the same size, bool [S, N].

    Raises:
        InvalidRequest: fewer than 3 subsets, which correlate with anything, or ones that hold all passages or none.
    """
    size = round(fraction * num_passages)
    if count < 3:
        raise InvalidRequest(f"{count} subsets tell nothing; give at least 3, better 40 or more")
    if not 0 < size < num_passages:
        raise InvalidRequest(
            f"a fraction of {fraction:g} keeps {size} of {num_passages} passages; give one that keeps some and not all"
        )
    masks_SN = np.zeros((count, num_passages), dtype=np.bool_)
    for number, mask_N in enumerate(masks_SN):
        mask_N[np.random.default_rng((seed, number)).permutation(num_passages)[:size]] = True
    return masks_SN


def subset_sums(scores: AllScores, masks_SN: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sums of scores over each subset, float64 [S, Q].

    Raises:
        InvalidRequest: scores are missing or not finite.
    """
    pieces = [(0, scores)] if isinstance(scores, np.ndarray) else scores
    total_SQ: NDArray[np.float64] | None = None
    place = 0
    for first, scores_Qn in pieces:
        if first != place or not np.isfinite(scores_Qn).all():
            raise InvalidRequest(
                f"the method gives no score of passage {place}"
                if first != place
                else f"the method gives scores that are no numbers among those of the passages from {first} on"
            )
        place = first + scores_Qn.shape[1]
        part_SQ = masks_SN[:, first:place].astype(np.float64) @ scores_Qn.T.astype(np.float64)
        total_SQ = part_SQ if total_SQ is None else total_SQ + part_SQ
    if total_SQ is None or place != masks_SN.shape[1]:
        raise InvalidRequest(f"the method scores {place} passages, the subsets are of {masks_SN.shape[1]}")
    return total_SQ


def datamodeling_score(
    scores: AllScores,
    masks_SN: NDArray[np.bool_],
    losses_SQ: NDArray[np.float64],
    *,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> DatamodelingScore:
    """LDS of a method.

    Args:
        scores: its scores of all passages; higher for those that lower the query's loss.
        masks_SN: the subsets.
        losses_SQ: losses of the queries after training on each (`retraining.retrain`).
        bootstrap: how both intervals are made.

    Raises:
        InvalidRequest: the shapes do not fit, or as `subset_sums`.
    """
    sums_SQ = subset_sums(scores, masks_SN)
    if sums_SQ.shape != losses_SQ.shape:
        raise InvalidRequest(
            f"there are losses of {losses_SQ.shape[1]} queries after {losses_SQ.shape[0]} runs, and scores of "
            f"{sums_SQ.shape[1]} queries for {sums_SQ.shape[0]} subsets"
        )
    values_Q = spearman(sums_SQ, -losses_SQ)

    def over(drawn_S: NDArray[np.int64]) -> float:
        return float(spearman(sums_SQ[drawn_S], -losses_SQ[drawn_S]).mean())

    return DatamodelingScore(
        values_Q=values_Q,
        over_queries=bootstrap.numbers(values_Q),
        over_subsets=bootstrap.statistic(over, len(masks_SN)),
    )


def spearman(one_SQ: NDArray[np.float64], other_SQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlation over the first axis, float64 [Q]; ties share their mean rank, and a constant gives 0."""
    one, other = (ranks - ranks.mean(axis=0) for ranks in (mean_ranks(one_SQ), mean_ranks(other_SQ)))
    scale_Q = np.sqrt((one**2).sum(axis=0) * (other**2).sum(axis=0))
    found_Q: NDArray[np.float64] = np.divide(
        (one * other).sum(axis=0), scale_Q, out=np.zeros_like(scale_Q), where=scale_Q > 0
    )
    return found_Q


def mean_ranks(values_SQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0 along the first axis, float64 [S, Q]; equal values share the mean of theirs."""
    order_SQ = np.argsort(values_SQ, axis=0, kind="stable")
    sorted_SQ = np.take_along_axis(values_SQ, order_SQ, axis=0)
    places_S1 = np.arange(len(values_SQ), dtype=np.float64)[:, None]
    starts = np.ones(values_SQ.shape, dtype=np.bool_)
    starts[1:] = sorted_SQ[1:] != sorted_SQ[:-1]
    ends = np.ones(values_SQ.shape, dtype=np.bool_)
    ends[:-1] = starts[1:]
    first_SQ = np.maximum.accumulate(np.where(starts, places_S1, 0.0), axis=0)
    last_SQ = np.minimum.accumulate(np.where(ends, places_S1, np.inf)[::-1], axis=0)[::-1]
    ranks_SQ = np.empty(values_SQ.shape)
    np.put_along_axis(ranks_SQ, order_SQ, (first_SQ + last_SQ) / 2, axis=0)
    return ranks_SQ


def plan_removals(
    lists: Lists, document_ids: Sequence[str], *, depth: int, queries_per_run: int = 1
) -> dict[str, Removal]:
    """Runs that show what a method's first passages were worth to the query.

    Args:
        lists: of every method, each query's documents, best first.
        document_ids: of every passage; a document goes with all its passages.
        depth: how many documents of each list are left out.
        queries_per_run: so many neighbouring queries share a run, which leaves the passages of all of them out.

    Raises:
        InvalidRequest: depth or queries_per_run is below 1, a document is not in the corpus, or nothing is left.
    """
    if depth < 1 or queries_per_run < 1:
        raise InvalidRequest(f"depth and queries_per_run must be at least 1; they are {depth} and {queries_per_run}")
    numbers: dict[str, list[int]] = {}
    for number, document in enumerate(document_ids):
        numbers.setdefault(document, []).append(number)
    found: dict[str, Removal] = {}
    for method, documents in lists.items():
        kept: list[tuple[int, ...]] = []
        for start in range(0, len(documents), queries_per_run):
            gone: set[int] = set()
            for listed in documents[start : start + queries_per_run]:
                for document in listed[:depth]:
                    if document not in numbers:
                        raise InvalidRequest(f"the method {method!r} lists {document!r}, which is not in the corpus")
                    gone.update(numbers[document])
            kept.append(tuple(number for number in range(len(document_ids)) if number not in gone))
            if not kept[-1]:
                raise InvalidRequest(
                    f"removing {depth} passages of {queries_per_run} queries leaves nothing to train on"
                )
        removed = [len(document_ids) - len(run) for run in kept]
        found[method] = Removal(
            kept=tuple(kept),
            run_Q=np.arange(len(documents), dtype=np.int64) // queries_per_run,
            num_removed=float(np.mean(removed)),
        )
    return found


def loss_rises(removal: Removal, losses_RQ: NDArray[np.float64], whole_Q: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much each query's loss is higher without the passages, float64 [Q].

    Args:
        removal: the runs.
        losses_RQ: losses of all queries after each of its runs.
        whole_Q: losses after training on everything.
    """
    own_Q: NDArray[np.float64] = losses_RQ[removal.run_Q, np.arange(len(removal.run_Q))]
    rises_Q: NDArray[np.float64] = own_Q - whole_Q
    return rises_Q
