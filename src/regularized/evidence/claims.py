"""What a paper claims, in a form that a run can refute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias

__all__ = ["Claim", "Direction", "EffectKind", "Outcome", "Reported", "Verdict"]

Direction: TypeAlias = Literal["higher", "lower"]
EffectKind: TypeAlias = Literal["difference", "relative"]


class Verdict(StrEnum):
    """Outcome of a claim, from paired differences over seeds."""

    HOLDS = "holds"
    DOES_NOT_HOLD = "does not hold"
    UNDECIDED = "undecided"
    NOT_RUN = "not run"


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

    The effect of a seed is ``method - baseline`` (``"difference"``, in the metric's unit) or
    ``(method - baseline) / |baseline|`` (``"relative"``, a share), with its sign turned where lower is better:
    *positive is always an improvement*. The claim holds when the whole interval of the mean effect lies at or above
    ``smallest_effect``, does not hold when it lies below, and is undecided otherwise or with fewer than five seeds.

    Args:
        id: short name, unique in its card.
        statement: one sentence in our own words.
        metric: name of the metric in the measurements.
        direction: which way is better.
        baseline: name of the baseline arm.
        method: name of the method arm.
        smallest_effect: the smallest improvement that counts, fixed before the first run; in the metric's unit, or a
            share for ``"relative"``. Negative for "not worse by more than". None while there is no experiment.
        kind: how the effect is computed; default ``"difference"``.
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
    smallest_effect: float | None = None
    kind: EffectKind = "difference"
    unit: str = ""
    scale: str = "laptop"
    reported: tuple[Reported, ...] = ()
    note: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Claim":
        """Build from a table of a card; unknown or missing keys are errors.

        Raises:
            ValueError: a key is missing or unknown, or a value is not allowed.
        """
        known = set(cls.__dataclass_fields__)
        required = {"id", "statement", "metric", "direction", "baseline", "method"}
        given = set(data)
        if missing := required - given:
            raise ValueError(f"claim {data.get('id', '?')!r} lacks {sorted(missing)}")
        if unknown := given - known:
            raise ValueError(f"claim {data['id']!r} has unknown keys {sorted(unknown)}; allowed: {sorted(known)}")
        if data["direction"] not in ("higher", "lower"):
            raise ValueError(f"claim {data['id']!r}: direction must be 'higher' or 'lower', got {data['direction']!r}")
        if data.get("kind", "difference") not in ("difference", "relative"):
            raise ValueError(f"claim {data['id']!r}: kind must be 'difference' or 'relative', got {data['kind']!r}")
        values = dict(data)
        values["reported"] = tuple(
            Reported(r["setting"], r.get("baseline"), r.get("method"), r.get("source", "paper"))
            for r in data.get("reported", ())
        )
        return cls(**values)

    def effect(self, baseline: float, method: float) -> float:
        """Improvement of one seed: positive is better.

        Examples:
            >>> claim = Claim("c", "s", "error", "lower", "plain", "ours")
            >>> claim.effect(baseline=5.0, method=3.0)
            2.0
        """
        gain = method - baseline if self.direction == "higher" else baseline - method
        return gain / abs(baseline) if self.kind == "relative" else gain


@dataclass(frozen=True, slots=True)
class Outcome:
    """A claim with what was measured for it.

    Args:
        claim: the claim.
        verdict: its verdict.
        effect: mean improvement over seeds, positive is better; None when nothing was run.
        interval: 95 % interval of ``effect``.
        effects: improvement of each seed.
        seeds: the seeds, in the order of ``effects``.
        problem: why there is no verdict although there are numbers: a seed failed, a value is not finite, the scale is
            too small. Empty otherwise.
    """

    claim: Claim
    verdict: Verdict
    effect: float | None = None
    interval: tuple[float, float] | None = None
    effects: Sequence[float] = field(default=())
    seeds: Sequence[int] = field(default=())
    problem: str = ""
