"""The comparison itself: plan, run, judge, recommend."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

from regularized.evidence.comparison.cost import measure_costs
from regularized.evidence.comparison.judging import Judged, Recommendation, best_trial, judge, recommend
from regularized.evidence.comparison.matrix import Candidate, Entry, Matrix, entry_of
from regularized.evidence.comparison.metrics import METRICS, default_metric
from regularized.evidence.comparison.models import Factory, make, source_of
from regularized.evidence.comparison.planning import PLAIN, apart, check, choose, make_plan, within
from regularized.evidence.comparison.problem import Problem, save
from regularized.evidence.comparison.result import Arm, Comparison, Plan
from regularized.evidence.comparison.snippet import snippet
from regularized.evidence.pool import AnyPool, Here, Pool
from regularized.evidence.provenance import cores
from regularized.evidence.statistics import interval_of_mean
from regularized.evidence.store import Store

__all__ = ["compare_problem"]

_SAMPLES_SEEN = 60_000  # in a training, as far as there are epochs for it


def compare_problem(
    problem: Problem,
    candidates: Sequence[Candidate],
    *,
    make_model: Factory | None = None,
    family: str,
    asked: Sequence[str] | None = None,
    metric: str | None = None,
    trials: int = 8,
    splits: int = 5,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    budget: float | None = None,
    combine: bool = False,
    workers: int | None = None,
    store: Store | None = None,
    fresh: bool = False,
    progress: bool = True,
    pool: Callable[..., AnyPool] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    source: str = "",
) -> Comparison:
    """Tune every candidate and the plain network alike, judge them on data that no choice has seen, say which helps.

    Args:
        problem: the data.
        candidates: all recipes there are, the baselines among them.
        make_model: makes a new network; default one that fits the kind of data.
        family: of the problem, for which recipes offer themselves.
        asked: names of the recipes that are wanted, or of several with ``+`` between, to be one arm; default those for
            the family. ``plain`` always is.
        metric: that decides; default accuracy, or the root mean squared error.
        trials: settings tried for each arm in each split; default 8.
        splits: how often the samples are dealt anew; default 5, at least 3.
        epochs: of a training; default as many as show about 60,000 samples, 10 to 100.
        batch_size: default 64, and 32 where fewer than 500 samples are trained on.
        optimizer: ``"sgd"`` (default; momentum 0.9) or ``"adamw"``.
        budget: seconds; splits, then trials are reduced until the estimate fits. Default none.
        combine: try what is best alone together, too.
        workers: parallel processes; default one for each usable core.
        store: where runs are kept; default the user's.
        fresh: make runs again that are there.
        progress: show how far it is.
        pool: what makes the runs, see :mod:`regularized.evidence.engines`; default processes on this machine, or this
            process alone where the network cannot be imported.
        on_plan: called with the plan before the first run.
        source: code that loads the data into ``problem``, for the snippet.

    Raises:
        ValueError: an argument is out of range, a name is unknown, no candidate can enter, or the budget is too small.
        Interrupted: Ctrl-C; finished runs are kept, and the same call goes on from there.
    """
    start = time.monotonic()
    metric = metric or default_metric(problem.task)
    check(problem, metric, trials, splits, optimizer)
    chosen, left_out = choose(problem, candidates, make_model, family, asked)
    model_source, sizes = source_of(make_model), problem.sizes()
    base: dict[str, Any] = {
        "data": str(save(problem)),
        "model": model_source.to_dict(),
        "epochs": epochs or max(10, min(100, round(_SAMPLES_SEEN / sizes["train"]))),
        "batch_size": batch_size or (64 if sizes["train"] >= 500 else 32),
        "optimizer": optimizer,
    }
    entries = [entry_of(members, trials) for members in chosen]
    costs = measure_costs(problem, {entry.name: entry.settings(base, 0) for entry in entries})
    count = (workers or cores()) if model_source.importable else 1
    plan = make_plan(problem, base, costs, entries, left_out, trials=trials, splits=splits, workers=count)
    if budget is not None:
        plan = within(plan, budget)
        entries = [entry_of(entry.members, plan.trials) for entry in entries]
    if on_plan is not None:
        on_plan(plan)
    if pool is not None and not model_source.importable:
        raise ValueError("the network can only be made in this process: put its factory into a module to run elsewhere")
    pool = pool or (Pool if model_source.importable else Here)
    with nullcontext(store) if store is not None else Store() as opened:
        matrix = Matrix(base, plan, opened, workers=count, fresh=fresh, progress=progress, pool=pool)
        matrix.run(entries)
        bench = _Bench(problem, matrix, metric)
        bench.add(entries, PLAIN)
        verdict = recommend(bench.judged)
        ratios = dict(costs.ratios)
        if combine:
            verdict = bench.combine(entries, verdict)
            if new := [entry for entry in bench.entries if entry.name not in ratios]:
                timed = {entry.name: entry.settings(base, 0) for entry in (entries[0], *new)}
                ratios |= measure_costs(problem, timed).ratios
    plain, *others = [bench.arm(entry, ratios[entry.name]) for entry in bench.entries]
    others.sort(key=lambda arm: arm.judged.effect if arm.judged is not None else 0.0, reverse=True)
    told = verdict.name or verdict.leads or PLAIN
    return Comparison(
        plan=plan,
        problem=family,
        metric=metric,
        arms=(plain, *others),
        recommended=verdict.name,
        leads=verdict.leads,
        snippet=snippet(
            problem,
            [member.recipe for member in next(entry for entry in bench.entries if entry.name == told).members],
            next(arm.settings for arm in (plain, *others) if arm.name == told),
            base,
            model=make(base["model"], problem.input_shape, problem.num_outputs),
            source=source,
        ),
        clean_test=problem.clean_test,
        seconds=time.monotonic() - start,
        reused=matrix.reused,
    )


class _Bench:
    """Where finished runs are judged.

    Args:
        problem: the problem.
        matrix: with the runs.
        metric: that decides.

    Attributes:
        entries: the arms, plain first.
        judged: each of the others against plain; corrected for those that were tried with it.
        additions: of those that add to another arm, each against that.
    """

    def __init__(self, problem: Problem, matrix: Matrix, metric: str) -> None:
        self.problem = problem
        self.matrix = matrix
        self.metric = metric
        self.entries: list[Entry] = []
        self.judged: dict[str, Judged] = {}
        self.additions: dict[str, tuple[str, Judged]] = {}
        sizes = matrix.plan.sizes
        self._resplit = sizes["judge"] / sizes["train"]

    def add(self, entries: Sequence[Entry], baseline: str) -> dict[str, Judged]:
        """Take arms in, the first of them the baseline, and judge the others against it."""
        judging, selection = (
            {entry.name: self.matrix.values(entry, self.metric, part, self.metric) for entry in entries}
            for part in ("judge", "selection")
        )
        direction = METRICS[self.metric].direction
        self.entries += [entry for entry in entries if entry not in self.entries]
        judged = judge(judging, selection, baseline=baseline, direction=direction, resplit=self._resplit)
        if baseline == PLAIN:
            self.judged |= judged
        else:
            self.additions |= {name: (baseline, of) for name, of in judged.items()}
        return judged

    def combine(self, singles: Sequence[Entry], verdict: Recommendation) -> Recommendation:
        """Add to what is best what is good alone, as long as an addition surely helps.

        An addition is judged like a candidate: against the arm that it is added to, tuned with as many trials,
        corrected for the number of additions that are tried.
        """
        while verdict.name is not None:
            best = next(entry for entry in self.entries if entry.name == verdict.name)
            tried = [
                entry_of((*best.members, *other.members), self.matrix.plan.trials)
                for other in singles
                if other.name != PLAIN
                and not any(member in best.members for member in other.members)
                and self.judged[other.name].selection_effect > 0
                and self._fit_together((*best.members, *other.members))
            ]
            if not tried:
                break
            self.matrix.run(tried)
            addition = recommend(self.add([best, *tried], best.name))
            self.add([singles[0], *tried], PLAIN)
            if addition.name is None:
                break
            verdict = addition
        return verdict

    def arm(self, entry: Entry, cost_ratio: float) -> Arm:
        """All that is told of an arm."""
        guards = [n for n, m in METRICS.items() if m.task == self.problem.task and n != self.metric]
        plain = self.entries[0]
        ran = [run for split in range(self.matrix.plan.splits) for run in self.matrix.runs(entry, split)]
        return Arm(
            name=entry.name,
            title="; ".join(member.recipe.title for member in entry.members),
            settings=self._settings(entry),
            values=tuple(self.matrix.values(entry, self.metric, "judge", self.metric)),
            guards={name: _mean(self.matrix.values(entry, name, "judge", self.metric)) for name in guards},
            worse={} if entry is plain else dict(self._worse(entry, plain, guards)),
            judged=self.judged.get(entry.name),
            addition=self.additions.get(entry.name),
            cost_ratio=cost_ratio,
            memory_ratio=self._memory(entry, plain),
            failed=sum(run is None or math.isnan(run.metrics[f"validation_{self.metric}"]) for run in ran),
        )

    def _worse(self, entry: Entry, plain: Entry, guards: Iterable[str]) -> Iterable[tuple[str, float]]:
        """Guard metrics whose interval lies on the wrong side of 0, and by how much they are worse."""
        for name in guards:
            sign = 1.0 if METRICS[name].direction == "higher" else -1.0
            ours, theirs = (self.matrix.values(arm, name, "judge", self.metric) for arm in (entry, plain))
            effects = [sign * (a - b) for a, b in zip(ours, theirs) if math.isfinite(a - b)]
            if len(effects) > 1 and interval_of_mean(effects, resplit=self._resplit)[1] < 0:
                yield name, -math.fsum(effects) / len(effects)

    def _settings(self, entry: Entry) -> Mapping[str, Any]:
        """The trial with the best mean validation metric over the splits."""
        splits = range(self.matrix.plan.splits)
        by_split = [self.matrix.runs(entry, split) for split in splits]
        means = [
            _mean([math.nan if run is None else run.metrics[f"validation_{self.metric}"] for run in of_trial])
            for of_trial in zip(*by_split)
        ]
        best = best_trial(means, METRICS[self.metric].direction)
        return entry.trials[best or 0]

    def _memory(self, entry: Entry, plain: Entry) -> float | None:
        """Peak memory over that of the plain arm; None where runs were made in one process, or nobody knows."""
        ours, theirs = (
            [run.peak_memory for run in self.matrix.runs(arm, 0) if run is not None and run.peak_memory]
            for arm in (entry, plain)
        )
        return median(ours) / median(theirs) if ours and theirs and self.matrix.apart else None

    def _fit_together(self, members: Sequence[Candidate]) -> bool:
        """Whether recipes can be one training: no procedure, which trains alone; and at most one task."""
        return apart(members, self.problem.task, self.problem.input_shape, self.problem.num_outputs) is None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
