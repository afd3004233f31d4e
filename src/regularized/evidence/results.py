"""What comes out of a comparison: runs, outcomes of claims, failures and the tuning table, ready for reports."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from regularized.evidence.claims import Claim, Outcome, claims_table
from regularized.evidence.experiment import Tuning
from regularized.evidence.statistics import common_by_chance
from regularized.evidence.store import Run, canonical
from regularized.evidence.verdicts import Measured, judge

__all__ = ["Failure", "ReproduceResult", "Trial", "TuningResult", "outcomes", "rank_trials"]

_ORDER = ("smoke", "laptop", "paper")


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that did not finish.

    Args:
        arm: its arm.
        seed: its seed.
        error: one line.
        traceback: the whole traceback, or the last output of a process that died.
        overrides: what was tried, in tuning.
    """

    arm: str
    seed: int
    error: str
    traceback: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of one arm that was tried in tuning.

    Args:
        arm: the arm.
        overrides: the setting.
        values: the deciding metric for each tuning seed; NaN where the run failed or diverged.
        best: whether it was the best of its arm.
    """

    arm: str
    overrides: Mapping[str, Any]
    values: tuple[float, ...]
    best: bool = False

    @property
    def mean(self) -> float:
        """Mean over the tuning seeds."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan


@dataclass(frozen=True, slots=True)
class TuningResult:
    """How the settings of the arms were chosen, with the same number of trials for each.

    Args:
        metric: the metric that decides.
        direction: which way is better.
        seeds: the tuning seeds.
        trials: all trials, arm by arm in the order of the grid.
        agrees: for each arm, whether the experiment runs it with the best setting found.
        failures: trials that did not finish.
        reused: how many runs were already in the store.
        seconds: wall time of the call.
    """

    metric: str
    direction: str
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    agrees: Mapping[str, bool] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    reused: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, Mapping[str, Any]]:
        """Best setting of each arm; an arm of which no trial finished is missing."""
        return {trial.arm: trial.overrides for trial in self.trials if trial.best}


@dataclass(slots=True)
class ReproduceResult:
    """All that one comparison showed.

    Args:
        slug: the paper.
        module_name: the experiment.
        scale: the scale.
        seeds: the seeds that were asked for.
        arms: names of the arms, baselines first.
        outcomes: one for each claim.
        runs: the runs, by seed and arm.
        failures: the runs that did not finish.
        notes: what a reader must know: seeds that failed, data that differed, uncommitted code.
        tuning: how the settings were chosen, where that was run for the same code.
        about: for each arm what it is measured on, and whether that is a ``toy``.
        environment: where and with what the comparison ran.
        code_key: the code.
        reused: how many of the runs were made by earlier calls.
        seconds: wall time of this call.
        report: the report, once :func:`regularized.evidence.report.write` wrote it.
        own_block: whether the seeds are another block than the experiment declares.
    """

    slug: str
    module_name: str
    scale: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = ()
    tuning: TuningResult | None = None
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    code_key: str = ""
    reused: int = 0
    seconds: float = 0.0
    report: Path | None = None
    own_block: bool = False

    def _repr_html_(self) -> str:
        """For notebooks."""
        return claims_table(self.outcomes)

    def runs_of(self, arm: str) -> list[Run]:
        """Runs of an arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    def values(self, arm: str, metric: str) -> list[float | None]:
        """A metric for each seed that was asked for; None where there is none."""
        by_seed = {run.seed: run.metrics.get(metric) for run in self.runs_of(arm)}
        return [by_seed.get(seed) for seed in self.seeds]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, those of the claims first."""
        first = dict.fromkeys(outcome.claim.metric for outcome in self.outcomes)
        return list(first | dict.fromkeys(name for run in self.runs for name in run.metrics))


def outcomes(
    claims: Sequence[Claim],
    runs: Sequence[Run],
    *,
    seeds: Sequence[int],
    scale: str,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    problem: str = "",
) -> tuple[Outcome, ...]:
    """Judge the claims of a card from runs.

    A claim stays open, whatever the numbers say, when a seed that was asked for is missing (to judge the seeds that
    survived would favour a method that fails now and then), when a value is not finite, or when the scale is smaller
    than the one at which the claim can be seen; :attr:`Outcome.problem` says which.

    Args:
        claims: all claims of the card: the correction for their number is over those that can be seen at this scale.
        runs: runs of the arms, none of them a trial of tuning.
        seeds: the seeds that were asked for.
        scale: scale of the runs.
        about: for each arm what it is measured on, see :meth:`~regularized.evidence.experiment.About.to_dict`, and
            ``toy``; default unknown, and then each seed is taken to have data of its own.
        problem: why nothing of this may be judged; default nothing.
    """
    measured = [_measured(claim, runs, seeds, scale, (about or {}).get(claim.method, {}), problem) for claim in claims]
    seen = [m for m in measured if not _too_small(m.claim, scale)]
    judged = dict(zip((m.claim.id for m in seen), judge(seen)))
    return tuple(judged[m.claim.id] if m.claim.id in judged else judge([m])[0] for m in measured)


def _too_small(claim: Claim, scale: str) -> bool:
    return scale in _ORDER and claim.scale in _ORDER and _ORDER.index(scale) < _ORDER.index(claim.scale)


def _measured(
    claim: Claim, runs: Sequence[Run], seeds: Sequence[int], scale: str, about: Mapping[str, Any], problem: str
) -> Measured:
    values: dict[str, dict[int, float]] = {claim.baseline: {}, claim.method: {}}
    for run in runs:
        if run.arm in values and claim.metric in run.metrics:
            values[run.arm][run.seed] = run.metrics[claim.metric]
    paired = [seed for seed in seeds if all(seed in by_seed for by_seed in values.values())]
    problems = [problem] if problem else []
    if len(paired) < len(seeds):
        missing = [seed for seed in seeds if seed not in paired]
        problems.append(f"no {claim.metric!r} of both arms for seeds {missing}")
    if _too_small(claim, scale):
        problems.append(f"this claim can be seen at {claim.scale} scale, not at {scale} scale")
    shown, toy = {name: value for name, value in about.items() if name != "toy"}, bool(about.get("toy"))
    common = common_by_chance(paired, float(about.get("share", 0.0)))
    if common:
        shown["sampling"] = "blocks"
    return Measured(
        claim,
        [values[claim.baseline][seed] for seed in paired],
        [values[claim.method][seed] for seed in paired],
        paired,
        resplit=float(about.get("resplit", 0.0)) + common,
        problem="; ".join(problems),
        about=shown,
        toy=toy,
    )


def rank_trials(
    tuning: Tuning, runs: Sequence[Run], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[tuple[Trial, ...], dict[str, bool]]:
    """Order the runs of a tuning grid into trials and mark the best of each arm.

    Best is the highest mean over the tuning seeds; among equals (accuracies of few samples often are) the one with the
    best mean rank over the seeds, then the first.

    Args:
        tuning: the grid.
        runs: finished runs, with their overrides.
        settings: what each arm runs with in the comparison.

    Returns:
        The trials; and for each arm whether the comparison uses its best trial.
    """
    found = {(run.arm, canonical(run.overrides), run.seed): run.metrics.get(tuning.metric, math.nan) for run in runs}
    sign = 1.0 if tuning.direction == "higher" else -1.0
    trials: list[Trial] = []
    agrees: dict[str, bool] = {}
    for arm, grid in tuning.grids.items():
        tried = [
            Trial(arm, dict(s), tuple(found.get((arm, canonical(s), seed), math.nan) for seed in tuning.seeds))
            for s in grid
        ]
        best = _best([[sign * value for value in trial.values] for trial in tried])
        if best is not None:
            tried[best] = replace(tried[best], best=True)
            used = settings.get(arm, {})
            agrees[arm] = all(name in used and used[name] == value for name, value in tried[best].overrides.items())
        trials.extend(tried)
    return tuple(trials), agrees


def _best(scores: Sequence[Sequence[float]]) -> int | None:
    """Position of the best row, higher being better; None when no row is finite."""
    finite = [i for i, row in enumerate(scores) if all(map(math.isfinite, row)) and row]

    def mean_rank(i: int) -> float:
        return math.fsum(sum(scores[j][k] > value for j in finite) for k, value in enumerate(scores[i]))

    return min(finite, key=lambda i: (-math.fsum(scores[i]), mean_rank(i), i), default=None)
