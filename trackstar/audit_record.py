"""What an audit of a generation found, where it is kept, and the gate that only lets audited generations answer.

    generations/<id>/audit.json     the last audit; beside generation.json, and no part of the generation's identity

A generation is activated only if its last audit passed. The audit itself is `trackstar.audit`; this module needs no
torch, so that whoever activates a generation, or shows its audit as metrics, goes without.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from trackstar.blobs import Location
from trackstar.errors import CorruptArtifact, NotFound, NotReady
from trackstar.storage import publish_json, read_json

NAME = "audit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """One audit of one generation.

    generation: its name. coarse: the coarse index that was searched, such as "memory" or a collection's name.
    queries, k, candidates: how many queries were asked, passages wanted of each, candidates of each coarse search.
    recall: share of the exact best k that coarse search and rerank find, averaged over queries and both ends;
    recall_opponents: that of the opponents alone; expected_recall: what the noise law expects for the scores of the
    exact best k; min_recall: what was asked for. num_codes: codes in the coarse index; num_passages: those there should
    be. codes_compared: sampled passages whose code and norm were computed again; codes_differing, norms_differing: how
    many of them were stored otherwise; bits_differing: single bits, 0 for a prefix. reasons: a sentence for everything
    that failed, none if it passed.
    """

    generation: str
    coarse: str
    queries: int
    k: int
    candidates: int
    recall: float
    recall_opponents: float
    expected_recall: float
    min_recall: float
    num_codes: int
    num_passages: int
    codes_compared: int
    codes_differing: int
    bits_differing: int
    norms_differing: int
    passed: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, content: Any) -> Audit:
        """What `to_dict` made.

        Raises:
            ValueError: it is something else; keys that are not known are passed over.
        """
        return _AUDIT.validate_python(content)


_AUDIT = TypeAdapter(Audit)


def publish_audit(home: Location, audit: Audit) -> None:
    """Keep an audit as the generation's last one.

    Args:
        home: the generation's folder.
        audit: what was found.

    Raises:
        StorageFull: no space.
    """
    publish_json(home / NAME, audit.to_dict())


def read_audit(home: Location) -> Audit | None:
    """The last audit of the generation in this folder; None if there is none.

    Raises:
        CorruptArtifact: what is kept is no audit of it.
    """
    try:
        content = read_json(home / NAME)
    except NotFound:
        return None
    try:
        audit = Audit.from_dict(content)
    except ValueError as error:
        raise _not_an_audit(home) from error
    if audit.generation != home.name:
        raise _not_an_audit(home)
    return audit


def withdraw_audit(home: Location) -> None:
    """Forget the last audit, because what it looked at has changed; harmless without one."""
    (home / NAME).unlink(missing_ok=True)


def check_audited(home: Location) -> None:
    """Return if the generation in this folder may be activated.

    Args:
        home: the generation's folder, `generations/<id>` of an index.

    Raises:
        NotReady: it was not audited, or its last audit failed; the sentence says why and what to do.
        CorruptArtifact: what is kept is no audit of it.
    """
    audit = read_audit(home)
    if audit is None:
        raise NotReady(f"generation {home.name!r} was not audited yet; give `{_command(home)}`")
    if not audit.passed:
        raise NotReady(
            f"generation {home.name!r} failed its audit: {'; '.join(audit.reasons)}; when that is done give "
            f"`{_command(home)}`, which takes less with --min-recall"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditGauge:
    """A number of an audit as a metric with the label `generation`: its name, what it says, where it comes from."""

    name: str
    help: str
    value: Callable[[Audit], float]


AUDIT_GAUGES = (
    AuditGauge(
        name="trackstar_audit_recall",
        help="Share of the exact best passages that coarse search and rerank found, in the generation's last audit.",
        value=lambda audit: audit.recall,
    ),
    AuditGauge(
        name="trackstar_audit_expected_recall",
        help="What the noise law of the coarse code expected that recall to be.",
        value=lambda audit: audit.expected_recall,
    ),
    AuditGauge(
        name="trackstar_audit_codes_differing",
        help="Sampled codes that were not those of their rows in the generation's last audit.",
        value=lambda audit: float(audit.codes_differing),
    ),
    AuditGauge(
        name="trackstar_audit_passed",
        help="1 if the generation's last audit passed, 0 if it failed.",
        value=lambda audit: float(audit.passed),
    ),
)


def _command(home: Location) -> str:
    return f"trackstar audit {shlex.quote(str(home.parent.parent))} --generation {home.name}"


def _not_an_audit(home: Location) -> CorruptArtifact:
    return CorruptArtifact(f"{str(home / NAME)!r} is no audit of this generation; give `{_command(home)}`")
