"""Verdicts on the parts of the ledger, read from finished runs."""

from __future__ import annotations

from lab.claims import evidence
from lab.claims.judge import Verdict
from lab.claims.ledger import ledger
from lab.experiments.profiles import Profile


def verdicts(p: Profile, number: str | None = None) -> list[Verdict]:
    """The verdict on every part of the ledger, or of one notebook, from finished runs; nothing is trained."""
    return evidence.verdicts(evidence.Stored(p), [q for q in ledger().values() if number in (None, q.notebook)])


def tested_elsewhere(p: Profile, number: str) -> list[Verdict]:
    """The verdict on every part of other notebooks that is no count: with this one's, the family of Holm's correction."""
    parts = [part for part in ledger().values() if part.notebook != number and part.kind != "exact"]
    return evidence.verdicts(evidence.Stored(p), parts)
