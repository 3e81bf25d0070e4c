"""Audits for tests of what only asks whether there was one."""

from __future__ import annotations

from pathlib import Path

from trackstar.audit_record import Audit, publish_audit


def audited(root: Path, name: str, num_codes: int, *, passed: bool = True) -> None:
    """Keep an audit of a generation of the index in `root`."""
    audit = Audit(
        generation=name,
        coarse="memory",
        queries=1,
        k=1,
        candidates=1,
        recall=1.0 if passed else 0.5,
        recall_opponents=1.0,
        expected_recall=1.0,
        min_recall=0.9,
        num_codes=num_codes,
        num_passages=num_codes,
        codes_compared=1,
        codes_differing=0,
        bits_differing=0,
        norms_differing=0,
        passed=passed,
        reasons=() if passed else ("it finds half of the best",),
    )
    publish_audit(root / "generations" / name, audit)
