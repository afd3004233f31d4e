"""The order "best proven": by the headlines of the abstracts that hold, and on more than a toy.

Counts of claims would not do: a card with many small claims would come before one with the paper's own.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from regularized.evidence.claims import Outcome, Verdict, count_verdicts
from regularized.papers.abstract import Sentence
from regularized.papers.card import Card

__all__ = ["Measured", "best_proven_first", "headlines", "margin", "standing"]


class Measured(Protocol):
    """What the order asks of a paper: an :class:`~regularized.papers.catalogue.Entry` has it."""

    @property
    def slug(self) -> str:
        """Short name."""
        ...

    @property
    def card(self) -> Card:
        """Facts and claims."""
        ...

    @property
    def implemented(self) -> bool:
        """Whether it runs."""
        ...

    @property
    def abstract(self) -> Sequence[Sentence]:
        """What the abstract claims."""
        ...

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """Claims with their verdicts."""
        ...


def best_proven_first(entry: Measured) -> tuple[float, float, int, str]:
    """Key of a paper in the order: :func:`standing`, then :func:`margin`; the newest first among equals."""
    return -standing(entry), -margin(entry.outcomes), -entry.card.date.toordinal(), entry.slug


def standing(entry: Measured) -> float:
    """How well proven a paper is: 2 to 3 where it has been measured, 1 where it runs unmeasured, 0 otherwise.

    Of what has been measured the :func:`headlines` that hold on more than a toy count, then, a hundred times less,
    those that hold at all, then, again a hundred times less, the share of all claims that hold.
    """
    counted = count_verdicts(entry.outcomes)
    claims = sum(counted.values())
    if counted[Verdict.NOT_RUN] == claims:
        return float(entry.implemented)
    shares = [headlines(entry.abstract, entry.outcomes, toys=toys) for toys in (False, True)]
    shares.append(counted[Verdict.HOLDS] / claims)
    weights = (1.0, 1e-2, 1e-4)
    return 2.0 + sum(weight * share for weight, share in zip(weights, shares, strict=True)) / sum(weights)


def headlines(sentences: Sequence[Sentence], outcomes: Iterable[Outcome], *, toys: bool) -> float:
    """Share of an abstract's claims that hold; one that several of ours test counts by the share of them that hold.

    What is untested does not hold, nor does a sanity check, which could not have failed.

    Args:
        sentences: what the abstract claims.
        outcomes: of the card's claims.
        toys: whether what was shown on a toy alone counts.
    """
    held = {
        outcome.claim.id: outcome.verdict is Verdict.HOLDS and (toys or not outcome.toy)
        for outcome in outcomes
        if outcome.claim.kind == "claim"
    }
    shares = [sum(held.get(name, False) for name in s.tested_by) / max(1, len(s.tested_by)) for s in sentences]
    return sum(shares) / max(1, len(shares))


def margin(outcomes: Iterable[Outcome]) -> float:
    """By how much the claims of a paper hold: lower ends of intervals in units of the smallest effect that counts.

    Averaged over the claims that hold and have such an effect above zero, each counted at most tenfold; 0 without any.
    """
    ratios = [
        min(10.0, outcome.interval[0] / smallest)
        for outcome in outcomes
        if outcome.verdict is Verdict.HOLDS
        and outcome.claim.kind == "claim"
        and outcome.interval
        and (smallest := outcome.claim.smallest_effect or 0.0) > 0
    ]
    return sum(ratios) / len(ratios) if ratios else 0.0
