"""What a paper claims, in a form that a run can refute."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self, TypeAlias

from regularized.evidence.numbers import number
from regularized.mechanisms.tables import html_table

__all__ = [
    "BADGES",
    "SHORT",
    "Attempted",
    "Claim",
    "Direction",
    "Kind",
    "Outcome",
    "Reported",
    "Verdict",
    "attempt_text",
    "claims_table",
    "count_verdicts",
    "counts_text",
    "effect_text",
    "interval_text",
    "reason_text",
    "threshold_text",
]

Direction: TypeAlias = Literal["higher", "lower"]
Kind: TypeAlias = Literal["claim", "sanity"]


class Verdict(StrEnum):
    """Outcome of a claim, from paired differences over seeds; see :mod:`regularized.evidence.verdicts` for the rule.

    Exactly one of the first five is given to a claim by one set of runs; ``contested`` is a claim on whose verdict
    several attempts to measure it disagree, see :mod:`regularized.evidence.attempts`.
    """

    HOLDS = "holds"
    SMALLER = "smaller than promised"
    NO_EFFECT = "no effect shown"
    OPPOSITE = "opposite"
    OPEN = "open"
    CONTESTED = "contested"
    NOT_RUN = "not run"


SHORT = {
    Verdict.HOLDS: "hold",
    Verdict.SMALLER: "smaller",
    Verdict.NO_EFFECT: "no effect",
    Verdict.OPPOSITE: "opposite",
    Verdict.OPEN: "open",
    Verdict.CONTESTED: "contested",
    Verdict.NOT_RUN: "not run",
}
"""Verdicts in a word or two, for counts."""

BADGES = {
    Verdict.HOLDS: "holds",
    Verdict.SMALLER: "smaller",
    Verdict.NO_EFFECT: "fails",
    Verdict.OPPOSITE: "fails",
    Verdict.OPEN: "open",
    Verdict.CONTESTED: "contested",
    Verdict.NOT_RUN: "none",
}
"""Class of a verdict in style sheets, those of reports and of the site."""


@dataclass(frozen=True, slots=True)
class Reported:
    """A number that the paper itself reports, to stand beside ours.

    Args:
        setting: data, model and metric, with unit.
        baseline: the paper's number for its baseline.
        method: the paper's number for its method.
        source: where it was read; says so where it is unconfirmed.
    """

    setting: str
    baseline: float | None
    method: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Claim:
    """One comparison: the method arm does better than the baseline arm by at least what counts.

    The effect of a seed is ``method - baseline`` in the metric's unit, or with ``relative`` the share
    ``(method - baseline) / |baseline|``, with its sign turned where lower is better: *positive is always an
    improvement*.

    Args:
        id: short name, unique in its card.
        statement: one sentence in our own words.
        metric: name of the metric in the measurements.
        direction: which way is better.
        baseline: name of the baseline arm.
        method: name of the method arm.
        differs: the settings in which the two arms may differ: the idea that is claimed. Beside them only settings may
            differ that were tuned in both arms over equal grids; anything else fails the contract.
        smallest_effect: the smallest improvement that counts, in the metric's unit, or a share for ``relative``.
            Negative for "not worse by more than". None while there is no experiment.
        relative: whether the effect is a share of the baseline; default False.
        kind: ``"claim"`` (default), or ``"sanity"`` for what is true by construction or equal at 0 or 100 %: shown
            apart, not counted, no part of the correction for many claims.
        pilot: whether ``smallest_effect`` was set after a pilot on the same data (other seeds); default False: it was
            fixed before anything was run.
        unit: unit of the metric, for tables.
        scale: smallest scale at which the claim can be seen.
        reported: the paper's own numbers.
        note: caveat shown beside the verdict.
    """

    id: str
    statement: str
    metric: str
    direction: Direction
    baseline: str
    method: str
    differs: tuple[str, ...] = ()
    smallest_effect: float | None = None
    relative: bool = False
    kind: Kind = "claim"
    pilot: bool = False
    unit: str = ""
    scale: str = "laptop"
    reported: tuple[Reported, ...] = ()
    note: str = ""

    def effect(self, baseline: float, method: float) -> float:
        """Improvement of one seed: positive is better.

        Examples:
            >>> claim = Claim("c", "s", "error", "lower", "plain", "ours")
            >>> claim.effect(baseline=5.0, method=3.0)
            2.0
        """
        gain = method - baseline if self.direction == "higher" else baseline - method
        return gain / abs(baseline) if self.relative else gain


@dataclass(frozen=True, slots=True)
class Attempted:
    """What one attempt says of a claim: the runs that ship, or those of another machine or person.

    Args:
        name: ``"shipped"``, or the name of the attempt's file: lower-case letters, digits, hyphens.
        verdict: by its own runs, corrected over all claims of the card.
        effect: mean improvement over its seeds; None where nothing was measured.
        interval: 95 % interval of ``effect``; None with fewer than two seeds.
        seeds: its seeds.
        by: who made it. Free text of a stranger, like the next three: whoever shows it escapes it.
        where: on what machine, in the maker's words.
        when: the day on which its last run ended.
        beside: what sets it apart from the runs that ship: seeds, processor, versions. Empty for these.
        apart: why it has no say in whether the claim is contested; empty where it has one.
    """

    name: str
    verdict: Verdict
    effect: float | None = None
    interval: tuple[float, float] | None = None
    seeds: Sequence[int] = ()
    by: str = ""
    where: str = ""
    when: str = ""
    beside: str = ""
    apart: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; an interval always has two ends, which are None while it is unknown."""
        return {
            **asdict(self),
            "verdict": self.verdict.value,
            "interval": list(self.interval or (None, None)),
            "seeds": list(self.seeds),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The same from JSON."""
        low, high = plain["interval"]
        given: dict[str, Any] = {**plain, "verdict": Verdict(plain["verdict"]), "seeds": tuple(plain["seeds"])}
        return cls(**given | {"interval": None if low is None else (low, high)})


@dataclass(frozen=True, slots=True)
class Outcome:
    """A claim with what was measured for it.

    Args:
        claim: the claim.
        verdict: its verdict.
        effect: mean improvement over seeds, positive is better; None when nothing was run.
        interval: 95 % interval of ``effect``, of this claim alone; None with fewer than two seeds.
        p_value: corrected for the number of claims: of "at least what counts" where the mean effect is, else of "less
            than what counts". None without a test.
        effects: improvement of each seed.
        seeds: the seeds, in the order of ``effects``.
        about: what was measured on, as :class:`~regularized.evidence.experiment.About` says it: ``data``, ``model``
            and the like; empty when unknown.
        toy: whether data or model are small where the paper's are not.
        problem: why there is no verdict although there are numbers: a seed failed, a value is not finite, the scale is
            too small. Empty otherwise.
        attempts: what each attempt says, the runs that ship first; empty for a set of runs by itself.
    """

    claim: Claim
    verdict: Verdict
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    effects: Sequence[float] = field(default=())
    seeds: Sequence[int] = field(default=())
    about: Mapping[str, Any] = field(default_factory=dict)
    toy: bool = False
    problem: str = ""
    attempts: Sequence[Attempted] = ()

    @property
    def worst_seed(self) -> tuple[int, float] | None:
        """The seed with the smallest effect, and that effect; None without any."""
        if not self.effects:
            return None
        worst = min(range(len(self.effects)), key=lambda i: self.effects[i])
        return self.seeds[worst], self.effects[worst]

    def _repr_html_(self) -> str:
        """For notebooks."""
        return claims_table([self])

    @property
    def reaching(self) -> int:
        """How many seeds reach the smallest effect that counts."""
        least = self.claim.smallest_effect
        return 0 if least is None else sum(effect >= least for effect in self.effects)


def effect_text(claim: Claim, effect: float | None) -> str:
    """An effect with sign and unit; a relative one in percent of the baseline.

    Examples:
        >>> claim = Claim("c", "s", "m", "higher", "a", "b", unit="points", relative=True)
        >>> effect_text(claim, 0.125)
        '+12.5 %'
    """
    if effect is None:
        return "–"
    value, unit = (100 * effect, "%") if claim.relative else (effect, claim.unit)
    return f"{'+' if value > 0 else ''}{number(value, 3)} {unit}".rstrip()


def threshold_text(claim: Claim) -> str:
    """The smallest effect that counts, for a table; a negative one in words, since it allows a loss.

    Examples:
        >>> threshold_text(Claim("c", "s", "m", "higher", "a", "b", smallest_effect=-0.0206, relative=True))
        'a loss of at most 2.06 %'
    """
    loss = _allowed_loss(claim)
    return f"a loss of at most {loss}" if loss else effect_text(claim, claim.smallest_effect)


def counts_text(claim: Claim) -> str:
    """The same in a sentence.

    Examples:
        >>> counts_text(Claim("c", "s", "m", "higher", "a", "b", smallest_effect=2.0, unit="points"))
        'counts from +2 points'
        >>> counts_text(Claim("c", "s", "m", "higher", "a", "b", smallest_effect=-0.5, unit="points"))
        'may lose at most 0.5 points'
    """
    loss = _allowed_loss(claim)
    return f"may lose at most {loss}" if loss else f"counts from {effect_text(claim, claim.smallest_effect)}"


def _allowed_loss(claim: Claim) -> str:
    """What a claim with a negative smallest effect may lose; empty for any other."""
    least = claim.smallest_effect
    return "" if least is None or least >= 0 else effect_text(claim, -least).lstrip("+")


def interval_text(claim: Claim, outcome: Outcome | Attempted) -> str:
    """The interval in the unit of :func:`effect_text`."""
    if outcome.interval is None:
        return "–"
    factor = 100 if claim.relative else 1
    low, high = (number(factor * end, 3) for end in outcome.interval)
    return f"[{low}, {high}]"


def reason_text(outcome: Outcome) -> str:
    """Why a claim has no verdict, or which ones are at odds; empty where it has one.

    Examples:
        >>> claim = Claim("c", "s", "m", "higher", "a", "b", smallest_effect=2.0, unit="points")
        >>> reason_text(Outcome(claim, Verdict.OPEN, effect=2.1))
        'surely neither at least +2 points nor less: more seeds would tell'
        >>> reason_text(Outcome(claim, Verdict.HOLDS, effect=5.0))
        ''
        >>> said = [Attempted("shipped", Verdict.HOLDS), Attempted("ada-1a2b3c4d", Verdict.NO_EFFECT)]
        >>> reason_text(Outcome(claim, Verdict.CONTESTED, effect=5.0, attempts=said))
        'attempts disagree: shipped holds; ada-1a2b3c4d no effect shown'
    """
    if outcome.verdict is Verdict.CONTESTED:
        return "attempts disagree: " + "; ".join(f"{one.name} {one.verdict.value}" for one in outcome.attempts)
    if outcome.problem or outcome.verdict is not Verdict.OPEN:
        return outcome.problem
    least = threshold_text(outcome.claim)
    if _allowed_loss(outcome.claim):
        return f"surely neither {least} nor a larger one: more seeds would tell"
    return f"surely neither at least {least} nor less: more seeds would tell"


def attempt_text(claim: Claim, one: Attempted) -> str:
    """An attempt at a claim in a line. It has a stranger's words in it: plain text, no markup.

    Examples:
        >>> claim = Claim("c", "s", "m", "higher", "a", "b", smallest_effect=2.0, unit="points")
        >>> ada = Attempted("ada-1a2b3c4d", Verdict.OPEN, 1.5, (-1.0, 4.0), range(300, 310), "Ada", when="2026-03-02")
        >>> attempt_text(claim, ada)
        'ada-1a2b3c4d (Ada, 2026-03-02): open, +1.5 points [-1, 4], seeds 300 to 309'
    """
    who = ", ".join(filter(None, [one.by, one.where, one.when]))
    seeds = f", seeds {one.seeds[0]} to {one.seeds[-1]}" if one.seeds else ""
    told = (
        f"{one.name} ({who}): {one.verdict.value}, {effect_text(claim, one.effect)} {interval_text(claim, one)}{seeds}"
    )
    return "; ".join(filter(None, [told, one.beside, one.apart and f"does not count: {one.apart}"]))


def claims_table(outcomes: Iterable[Outcome]) -> str:
    """Claims with effect, interval and verdict as HTML, for notebooks."""
    head = ["claim", "arms", "effect", "95 % interval", "counts from", "verdict"]
    return html_table(
        head,
        (
            [
                outcome.claim.statement,
                f"{outcome.claim.method} over {outcome.claim.baseline}",
                effect_text(outcome.claim, outcome.effect),
                interval_text(outcome.claim, outcome),
                threshold_text(outcome.claim),
                ": ".join(filter(None, [outcome.verdict.value, reason_text(outcome)])),
            ]
            for outcome in outcomes
        ),
    )


def count_verdicts(outcomes: Iterable[Outcome], *, kind: Kind = "claim") -> dict[Verdict, int]:
    """How many claims of a kind have each verdict; claims of kind ``"sanity"`` are counted apart.

    Examples:
        >>> claim = Claim("c", "s", "error", "lower", "plain", "ours")
        >>> count_verdicts([Outcome(claim, Verdict.OPEN)])[Verdict.OPEN]
        1
    """
    verdicts = [outcome.verdict for outcome in outcomes if outcome.claim.kind == kind]
    return {verdict: verdicts.count(verdict) for verdict in Verdict}
