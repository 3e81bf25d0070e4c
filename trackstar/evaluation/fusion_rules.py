"""Rules that make one list of a lexical and an influence method's lists, each a point between the two.

    weights      w · lexical + (1 - w) · influence, of scores that are scaled in each list (`fusion.SCALES`)
    ranks        w / (constant + lexical rank) + (1 - w) / (constant + influence rank)
    lead         the first n of a leader, then the rest by influence
    share        the first n of a leader and so many of influence's that there are D, all in the leader's order; then
                 the rest in the leader's order
    within lexical, within influence
                 the first n of the one method, in the other's order; then the rest as they are
    lead within  the lexical method's first one, then the rest of its first n by influence; then the rest
    agreed       the lexical method's first one, then what is among the first n of both, in the lexical order; then the
                 rest by influence

A leader is the lexical list, or one of the lists of `weights` in which the lexical method weighs more.

A mean over a list's first D passages does not depend on their order, and a reciprocal rank depends on the first gold
passage alone: so `share` chooses which passages are among the first D for the one measure and orders them for the
other. A rule sees ids and scores, never gold. Numbers of passages are those of one query's two lists: the lexical list
first, in its order, so that ties go to the passage that the lexical method ranks higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trackstar.evaluation.fusion import SCALES, joined
from trackstar.evaluation.retrieval import Retrieval

Family = Literal["weights", "ranks", "lead", "share", "within lexical", "within influence", "lead within", "agreed"]
FAMILIES: tuple[Family, ...] = (
    "weights",
    "ranks",
    "lead",
    "share",
    "within lexical",
    "within influence",
    "lead within",
    "agreed",
)
_CONSTANTS = (0.0, 10.0, 60.0)
_LEADS = (1, 2, 3, 5)
_LEADERS = (1.0, 0.9, 0.8, 0.7, 0.6)
_WIDTHS = (2, 3, 5, 10, 20, 50)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rule:
    """One rule. `curve`: what its plots join it with; `order` gives all passages of two lists, best first."""

    name: str
    family: Family | Literal["parent"]
    curve: str
    order: Callable[[Retrieval, Retrieval], Sequence[int]]


def rules(families: Iterable[Family], depth: int) -> list[Rule]:
    """All rules of some families, the simplest first.

    Args:
        families: of `FAMILIES`.
        depth: D, how many of a list's first passages tail-patch counts.
    """
    makers: dict[Family, Callable[[], Iterable[Rule]]] = {
        "weights": _weights,
        "ranks": _ranks,
        "lead": lambda: (
            _rule("lead", f"lead {n}{_of(weight)}", _lead(n, weight), f"lead{_of(weight)}")
            for weight in _LEADERS
            for n in _LEADS
        ),
        "share": lambda: (
            _rule("share", f"share {n} of {depth}{_of(weight)}", _share(n, depth, weight), f"share{_of(weight)}")
            for weight in _LEADERS
            for n in range(depth)
        ),
        "within lexical": lambda: (_rule("within lexical", f"within lexical {n}", _within(n)) for n in _WIDTHS),
        "within influence": lambda: (
            _rule("within influence", f"within influence {n}", _swapped(_within(n))) for n in _WIDTHS
        ),
        "lead within": lambda: (_rule("lead within", f"lead within {n}", _lead_within(n)) for n in _WIDTHS[1:]),
        "agreed": lambda: (_rule("agreed", f"agreed {n}", _agreed(n)) for n in _WIDTHS[2:]),
    }
    chosen = set(families)
    return [rule for family in FAMILIES if family in chosen for rule in makers[family]()]


Order = Callable[[Retrieval, Retrieval], Sequence[int]]


def _rule(family: Family, name: str, order: Order, curve: str | None = None) -> Rule:
    return Rule(name=name, family=family, curve=curve or family, order=order)


def _weights() -> Iterable[Rule]:
    for scale in SCALES:
        for weight in range(1, 20):
            name = f"weights {weight / 20:g}, {scale}"
            yield _rule("weights", name, _weighted(weight / 20, scale), f"weights, {scale}")


def _ranks() -> Iterable[Rule]:
    for constant in _CONSTANTS:
        for weight in range(1, 10):
            name = f"ranks {weight / 10:g}, constant {constant:g}"
            yield _rule("ranks", name, _ranked(weight / 10, constant), f"ranks, constant {constant:g}")


def _weighted(weight: float, scale: str) -> Order:
    def order(lexical: Retrieval, influence: Retrieval) -> Sequence[int]:
        shares = [weight * SCALES[scale](lexical.scores), (1 - weight) * SCALES[scale](influence.scores)]
        return _all("", [lexical, influence], shares)

    return order


def _ranked(weight: float, constant: float) -> Order:
    def order(lexical: Retrieval, influence: Retrieval) -> Sequence[int]:
        shares = [
            one / (constant + np.arange(1, len(item.positions) + 1))
            for one, item in ((weight, lexical), (1 - weight, influence))
        ]
        return _all("", [lexical, influence], shares)

    return order


def _all(query_id: str, found: Sequence[Retrieval], shares: Sequence[np.ndarray]) -> Sequence[int]:
    together = joined(query_id, found, shares, k=sum(len(item.positions) for item in found))
    ids: list[int] = together.positions.tolist()
    return ids


def _of(weight: float) -> str:
    """How a leader's name ends."""
    return "" if weight == 1 else f" by weights {weight:g}"


def _leader(weight: float) -> Order:
    if weight < 1:
        return _weighted(weight, "range")
    return lambda lexical, influence: _once(_ids(lexical), _ids(influence))


def _lead(num: int, weight: float) -> Order:
    leader = _leader(weight)
    return lambda lexical, influence: _once(
        leader(lexical, influence)[:num], _ids(influence), leader(lexical, influence)
    )


def _share(num: int, depth: int, weight: float) -> Order:
    leader = _leader(weight)

    def order(lexical: Retrieval, influence: Retrieval) -> Sequence[int]:
        ranked = leader(lexical, influence)
        kept = set(_once(ranked[:num], _ids(influence), ranked)[:depth])
        return _once([one for one in ranked if one in kept], ranked)

    return order


def _within(num: int) -> Order:
    def order(outer: Retrieval, inner: Retrieval) -> Sequence[int]:
        head = set(_ids(outer)[:num])
        return _once([one for one in _ids(inner) if one in head], _ids(outer), _ids(inner))

    return order


def _swapped(order: Order) -> Order:
    return lambda lexical, influence: order(influence, lexical)


def _lead_within(num: int) -> Order:
    def order(lexical: Retrieval, influence: Retrieval) -> Sequence[int]:
        return _once(_ids(lexical)[:1], _within(num)(lexical, influence))

    return order


def _agreed(num: int) -> Order:
    def order(lexical: Retrieval, influence: Retrieval) -> Sequence[int]:
        close = set(_ids(influence)[:num])
        both = [one for one in _ids(lexical)[:num] if one in close]
        return _once(_ids(lexical)[:1], both, _ids(influence), _ids(lexical))

    return order


def _ids(item: Retrieval) -> list[int]:
    ids: list[int] = item.positions.tolist()
    return ids


def _once(*parts: Sequence[int]) -> list[int]:
    """All of the parts in order, each at its first place."""
    return list(dict.fromkeys(one for part in parts for one in part))
