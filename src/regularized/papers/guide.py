"""Which technique to try first for a problem, computed from cards and ledgers: nothing in it is typed in."""

from collections.abc import Iterable
from dataclasses import dataclass

from regularized.evidence.bench_rows import BenchRow, load
from regularized.evidence.claims import Outcome, Verdict
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import Entry, load_catalogue
from regularized.papers.proof import margin

__all__ = ["Advice", "advise"]

_FAILED = (Verdict.OPPOSITE, Verdict.NO_EFFECT, Verdict.SMALLER)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to know of a technique before trying it on a problem.

    Args:
        entry: the paper.
        rank: 1 is to be tried first; None for one of which no claim holds.
        kept: the claim that holds by the largest margin.
        broken: a claim that does not hold, the worst verdict first.
        cost: least and largest ratio of its step to a plain one; None where that was not measured.
    """

    entry: Entry
    rank: int | None
    kept: Outcome | None
    broken: Outcome | None
    cost: tuple[float, float] | None


def advise(family: str, entries: Iterable[Entry] | None = None) -> list[Advice]:
    """The techniques for a problem in the order in which to try them.

    As the catalogue has them, best proven first. A technique of which none holds is
    last, and has no rank: beside a baseline that was tuned as carefully it has kept no promise here.

    Args:
        family: of problems, see :data:`regularized.papers.card.FAMILIES`.
        entries: of the catalogue, best first; default all.

    Raises:
        ValueError: there is no such family.

    Examples:
        >>> first = advise("noisy_labels")[0]
        >>> first.rank, first.kept.verdict.value
        (1, 'holds')
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no problem {family!r}; there are {sorted(FAMILIES)}")
    meant = [
        entry
        for entry in (load_catalogue() if entries is None else entries)
        if entry.implemented and family in entry.card.families
    ]
    ranked = [entry for entry in meant if _kept(entry) is not None]
    return [
        Advice(
            entry,
            ranked.index(entry) + 1 if entry in ranked else None,
            _kept(entry),
            _broken(entry),
            _cost(entry),
        )
        for entry in [*ranked, *(entry for entry in meant if entry not in ranked)]
    ]


def _claims(entry: Entry) -> list[Outcome]:
    return [outcome for outcome in entry.outcomes if outcome.claim.kind == "claim"]


def _kept(entry: Entry) -> Outcome | None:
    held = [outcome for outcome in _claims(entry) if outcome.verdict is Verdict.HOLDS]
    return max(held, key=lambda outcome: margin([outcome]), default=None)


def _broken(entry: Entry) -> Outcome | None:
    failed = [outcome for outcome in _claims(entry) if outcome.verdict in _FAILED]
    return min(failed, key=lambda outcome: _FAILED.index(outcome.verdict), default=None)


def _cost(entry: Entry) -> tuple[float, float] | None:
    saved = load(entry.folder / "bench.json")
    rows: list[BenchRow] = saved["rows"] if saved else []
    ratios = [row.ratio for row in rows]
    return (min(ratios), max(ratios)) if ratios else None
