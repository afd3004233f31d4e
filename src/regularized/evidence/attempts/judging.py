"""The claims of a card with what each attempt says of them, and whether the attempts are at odds.

Each attempt is judged by itself, by the rule of :mod:`regularized.evidence.verdicts`, with a correction over all claims
of the card. A claim keeps the verdict of the runs that ship, unless two attempts contradict each other: then it is
*contested*. Two verdicts contradict each other when they cannot both be true:

=========================  ================================================================
**holds**                  and *smaller than promised*, *no effect shown* or *opposite*:
                           surely at least what counts, and surely less
**smaller than promised**  and *opposite*: surely above zero, and surely below
=========================  ================================================================

*No effect shown* says less than what counts and nothing of zero, so that it agrees with *smaller* and with *opposite*;
*open* says nothing and agrees with all. An attempt that decides what is open here does not decide it for us: to take
whichever attempt has an answer would be a choice after a look.

Public names: :func:`together`, :func:`disagree`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from regularized.evidence.attempts.form import Attempt
from regularized.evidence.claims import Attempted, Claim, Outcome, Verdict
from regularized.evidence.ledger import Ledger, fixed

__all__ = ["SHIPPED", "disagree", "together"]

SHIPPED = "shipped"
"""Name of the attempt that the ledger is."""

_CONTRADICT = {
    frozenset(pair)
    for pair in (
        (Verdict.HOLDS, Verdict.SMALLER),
        (Verdict.HOLDS, Verdict.NO_EFFECT),
        (Verdict.HOLDS, Verdict.OPPOSITE),
        (Verdict.SMALLER, Verdict.OPPOSITE),
    )
}


def disagree(verdicts: Iterable[Verdict]) -> bool:
    """Whether two of some verdicts on one claim cannot both be true.

    Examples:
        >>> disagree([Verdict.HOLDS, Verdict.OPEN, Verdict.HOLDS]), disagree([Verdict.HOLDS, Verdict.NO_EFFECT])
        (False, True)
    """
    return any(frozenset(pair) in _CONTRADICT for pair in combinations(set(verdicts), 2))


def together(claims: Sequence[Claim], shipped: Ledger | None, attempts: Sequence[Attempt]) -> tuple[Outcome, ...]:
    """Each claim as the runs that ship show it, with what every attempt says.

    Args:
        claims: all claims of the card.
        shipped: the ledger; None without one, and then all claims are *not run* here, whatever others say.
        attempts: those that lie beside it.
    """
    ours = [Outcome(claim, Verdict.NOT_RUN) for claim in claims] if shipped is None else shipped.outcomes(claims)
    theirs = [(attempt, attempt.ledger.outcomes(claims)) for attempt in attempts]
    return tuple(
        _told(outcome, shipped, [(attempt, outcomes[place]) for attempt, outcomes in theirs])
        for place, outcome in enumerate(ours)
    )


def _told(ours: Outcome, shipped: Ledger | None, theirs: Sequence[tuple[Attempt, Outcome]]) -> Outcome:
    said = [] if shipped is None else [_shipped(ours, shipped)]
    said += [_said(attempt, outcome, shipped) for attempt, outcome in theirs]
    contested = disagree(one.verdict for one in said if not one.apart)
    return replace(ours, attempts=tuple(said), verdict=Verdict.CONTESTED if contested else ours.verdict)


def _shipped(outcome: Outcome, ledger: Ledger) -> Attempted:
    return Attempted(**_measured(outcome, ledger), name=SHIPPED, by="regularized", where=_machine(ledger))


def _said(attempt: Attempt, outcome: Outcome, shipped: Ledger | None) -> Attempted:
    return Attempted(
        **_measured(outcome, attempt.ledger),
        name=attempt.name,
        by=attempt.maker.by,
        where=attempt.maker.where or _machine(attempt.ledger),
        beside="" if shipped is None else "; ".join(_beside(attempt.ledger, shipped, outcome)),
        apart=_apart(attempt.ledger, shipped, outcome.claim),
    )


def _measured(outcome: Outcome, ledger: Ledger) -> dict[str, Any]:
    return {
        "verdict": outcome.verdict,
        "effect": outcome.effect,
        "interval": outcome.interval,
        "seeds": tuple(outcome.seeds),
        "when": max((run.created[:10] for run in ledger.runs), default=""),
    }


def _machine(ledger: Ledger) -> str:
    """Processor, and the accelerator where there is one."""
    about = ledger.environment
    return ", ".join(str(about[name]) for name in ("cpu", "device") if about.get(name, "cpu") != "cpu")


def _beside(theirs: Ledger, ours: Ledger, outcome: Outcome) -> Iterable[str]:
    """What is independent of the runs that ship, and what is not."""
    if set(theirs.seeds) == set(ours.seeds):
        yield "the same seeds, and so the same data: it repeats the numerics, not the draw"
    elif set(theirs.seeds) & set(ours.seeds):
        yield "some of the same seeds"
    elif outcome.about.get("sampling") == "resplit":
        yield "other seeds, which split the same small pool again"
    else:
        yield "other seeds, with data of their own"
    yield "another machine" if _machine(theirs) != _machine(ours) else "the same kind of machine"
    differing = [f"{name} {version}" for name, version in _versions(theirs).items() if _versions(ours)[name] != version]
    yield f"other versions ({', '.join(differing)})" if differing else "the same versions"


def _versions(ledger: Ledger) -> Mapping[str, str]:
    return ledger.runs[0].versions


def _apart(theirs: Ledger, ours: Ledger | None, claim: Claim) -> str:
    """Why an attempt cannot contest a verdict: it measured something else."""
    if ours is None:
        return "there are no runs of ours beside it"
    if theirs.code_key not in ours.codes:
        return "it measured other code than the ledger"
    if theirs.scale != ours.scale:
        return "it measured at another scale"
    if theirs.claims.get(claim.id) != fixed(claim):
        return "the claim was stated otherwise when it was made"
    return ""
