"""What a comparison says: arms, recommendation, and the code that goes with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regularized.evidence.comparison.judging import Judged
from regularized.evidence.comparison.metrics import METRICS, Metric
from regularized.evidence.numbers import number
from regularized.mechanisms.tables import html_table

__all__ = ["Arm", "Comparison", "Plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a comparison is going to do, before the first run.

    Args:
        data: in words.
        model: in words.
        arms: the candidates, plain first.
        left_out: other techniques, with the reason of each.
        trials: settings that are tried for each arm in each split.
        splits: how often the samples are dealt.
        epochs: of a training.
        sizes: samples of each part.
        runs: trainings in all.
        seconds: how long they will take, estimated from timed steps.
        workers: how many run at a time.
    """

    data: str
    model: str
    arms: tuple[str, ...]
    left_out: Mapping[str, str]
    trials: int
    splits: int
    epochs: int
    sizes: Mapping[str, int]
    runs: int
    seconds: float
    workers: int

    def lines(self) -> list[str]:
        """For a person."""
        parts = ", ".join(f"{size} {part}" for part, size in self.sizes.items())
        lines = [
            f"data: {self.data} ({parts})",
            f"network: {self.model}, {self.epochs} epochs",
            f"arms: {', '.join(self.arms)}",
            f"{self.runs} trainings: {len(self.arms)} arms x {self.trials} trials x {self.splits} splits; about "
            f"{duration(self.seconds)} on {self.workers} {'core' if self.workers == 1 else 'cores'}",
        ]
        return lines + [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]


@dataclass(frozen=True, slots=True)
class Arm:
    """One technique, or the plain training, in a comparison.

    Args:
        name: of the recipe, or of several with `` + `` between.
        title: in a few words.
        settings: the trial with the best validation metric over all splits.
        values: the deciding metric on the judging part of each split, each with the trial that is best there.
        guards: the other metrics on the judging part, mean over splits.
        worse: guard metrics that surely are worse than those of the plain arm, with the mean difference.
        judged: against the plain arm; None for that.
        addition: of several together, the arm that the last one was added to, and the verdict against that.
        cost_ratio: time of a step over that of a plain one.
        memory_ratio: peak memory of a run over that of a plain one; None where it is not known.
        failed: trainings that diverged or failed.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    values: tuple[float, ...]
    guards: Mapping[str, float]
    worse: Mapping[str, float] = field(default_factory=dict)
    judged: Judged | None = None
    addition: tuple[str, Judged] | None = None
    cost_ratio: float = 1.0
    memory_ratio: float | None = None
    failed: int = 0

    @property
    def mean(self) -> float:
        """Of the values."""
        return sum(self.values) / len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        over, added = self.addition or ("", None)
        return {
            "name": self.name,
            "title": self.title,
            "settings": dict(self.settings),
            "values": list(self.values),
            "guards": dict(self.guards),
            "worse": dict(self.worse),
            **_verdict(self.judged),
            "addition": None if added is None else {"to": over, **_verdict(added)},
            "cost_ratio": self.cost_ratio,
            "memory_ratio": self.memory_ratio,
            "failed": self.failed,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result.

    Args:
        plan: what was done.
        problem: family of the problem.
        metric: that decides.
        arms: plain first, then by their effect.
        recommended: name of an arm, or None.
        leads: the arm in front, certain or not; None where none is above plain.
        snippet: code that trains with the recommended, leading or plain settings.
        clean_test: whether trusted targets were judged on.
        seconds: wall time of this call.
        reused: trainings that were there from earlier calls.
        report: folder with the report, once it is written.
    """

    plan: Plan
    problem: str
    metric: str
    arms: tuple[Arm, ...]
    recommended: str | None
    leads: str | None
    snippet: str
    clean_test: bool
    seconds: float
    reused: int = 0
    report: Path | None = None

    def __getitem__(self, name: str) -> Arm:
        """The arm of a name.

        Raises:
            KeyError: there is none.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(f"no arm {name!r}; there are {[arm.name for arm in self.arms]}")

    @property
    def about(self) -> Metric:
        """What the metric is."""
        return METRICS[self.metric]

    @property
    def further_splits(self) -> int | None:
        """How many more splits would decide for the arm in front; 0 where it is decided, None where none would."""
        judged = None if self.leads is None else self[self.leads].judged
        return None if judged is None else judged.further_splits

    @property
    def recommendation(self) -> str:
        """In a sentence or two; that nothing helps is one, too."""
        metric = self.metric.replace("_", " ")
        if self.recommended is not None:
            arm = self[self.recommended]
            assert arm.judged is not None
            return (
                f"Use {arm.name}: its {metric} is {self.difference(arm.judged.effect)} better than that of the plain "
                f"network, tuned alike ({self.interval(arm.judged)}), at {arm.cost_ratio:.2f} times the cost of a step."
                + self._price(arm)
            )
        nothing = "Nothing here is surely better than the plain network with tuned learning rate and weight decay."
        if self.leads is None:
            return nothing
        judged = self[self.leads].judged
        assert judged is not None
        more = (
            "more splits of these data would not tell, more data would"
            if judged.further_splits is None
            else f"if it stays so, about {judged.further_splits} further splits would tell"
        )
        return f"{nothing} {self.leads} leads with {self.difference(judged.effect)} ({self.interval(judged)}): {more}."

    def difference(self, value: float) -> str:
        """An effect with its unit."""
        return f"{'+' if value > 0 else ''}{number(value, 3)} {self.about.unit}".rstrip()

    def interval(self, judged: Judged) -> str:
        """The interval of an effect."""
        low, high = (number(end, 3) for end in judged.interval)
        return f"95 % interval {low} to {high}"

    def table(self) -> tuple[Sequence[str], list[list[str]]]:
        """Head and rows for a person."""
        guards = list(self.arms[0].guards)
        head = ["arm", self.metric, "effect", "95 % interval", "p", *guards, "cost", "memory"]
        rows = []
        for arm in self.arms:
            judged = arm.judged
            mark = " *" if arm.name == self.recommended else ""
            rows.append(
                [
                    arm.name + mark,
                    number(arm.mean),
                    "" if judged is None else self.difference(judged.effect),
                    "" if judged is None else " to ".join(number(end, 3) for end in judged.interval),
                    "" if judged is None else f"{judged.p_value:.3f}",
                    *(number(arm.guards[name]) + ("!" if name in arm.worse else "") for name in guards),
                    f"{arm.cost_ratio:.2f}",
                    "" if arm.memory_ratio is None else f"{arm.memory_ratio:.2f}",
                ]
            )
        return head, rows

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "data": {"name": self.plan.data, "sizes": dict(self.plan.sizes), "clean_test": self.clean_test},
            "problem": self.problem,
            "metric": {"name": self.metric, "direction": self.about.direction, "unit": self.about.unit},
            "model": self.plan.model,
            "splits": self.plan.splits,
            "trials": self.plan.trials,
            "epochs": self.plan.epochs,
            "arms": [arm.to_dict() for arm in self.arms],
            "left_out": dict(self.plan.left_out),
            "recommendation": {"name": self.recommended, "sentence": self.recommendation},
            "leads": self.leads,
            "further_splits": self.further_splits,
            "snippet": self.snippet,
            "seconds": self.seconds,
            "reused": self.reused,
            "report": None if self.report is None else str(self.report),
        }

    def _price(self, arm: Arm) -> str:
        if not arm.worse:
            return ""
        told = [f"{name} by {number(by, 3)} {METRICS[name].unit}".rstrip() for name, by in arm.worse.items()]
        return f" The price: it is worse in {' and '.join(told)}."

    def _repr_html_(self) -> str:
        """For notebooks."""
        from html import escape

        return f"<p>{escape(self.recommendation)}</p>{html_table(*self.table())}"


def _verdict(judged: Judged | None) -> dict[str, Any]:
    if judged is None:
        return {"effect": None, "interval": None, "p_value": None}
    return {"effect": judged.effect, "interval": list(judged.interval), "p_value": judged.p_value}


def duration(seconds: float) -> str:
    """A time in words.

    Examples:
        >>> duration(42.0), duration(600.0), duration(9000.0)
        ('42 s', '10 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
