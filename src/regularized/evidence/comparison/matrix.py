"""Arms x trials x splits: what each run runs with, making those that are missing, and finding them again."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from regularized.evidence.comparison.baselines import COMMON
from regularized.evidence.comparison.judging import best_trial
from regularized.evidence.comparison.metrics import METRICS
from regularized.evidence.comparison.recipe import Recipe
from regularized.evidence.comparison.result import Plan
from regularized.evidence.comparison.space import Space, points
from regularized.evidence.pool import AnyPool, Here, Job
from regularized.evidence.provenance import code_key
from regularized.evidence.runner import run_jobs
from regularized.evidence.store import Run, Store, canonical

__all__ = ["Candidate", "Entry", "Matrix", "entry_of"]

_MODULE = "regularized.evidence.comparison.experiment"
_SLUG = "comparison"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe and where other processes find it.

    Args:
        recipe: the recipe.
        module_name: the module with it in ``RECIPES``.
    """

    recipe: Recipe
    module_name: str

    @property
    def reference(self) -> tuple[str, str]:
        """What a run's settings say: where it is, and its code."""
        return f"{self.module_name}:{self.recipe.name}", _code(self.module_name)


@cache
def _code(module_name: str) -> str:
    """Code key of a module, which takes a while, once: a process does not change what it has imported."""
    return code_key(module_name)


@dataclass(frozen=True, slots=True)
class Entry:
    """An arm: one candidate, or several together, and the settings to try.

    Args:
        name: of the recipe; of several, with `` + `` between.
        members: the candidates.
        trials: for each trial ``lr``, ``weight_decay``, and under ``own`` the settings of each recipe.
        recipes: the references of the members: reading the code that they depend on takes a while, so once.
    """

    name: str
    members: tuple[Candidate, ...]
    trials: tuple[Mapping[str, Any], ...]
    recipes: tuple[tuple[str, str], ...]

    def settings(self, base: Mapping[str, Any], trial: int) -> dict[str, Any]:
        """What a run of one of its trials gets."""
        return {**base, **self.trials[trial], "recipes": [list(reference) for reference in self.recipes]}


def entry_of(members: Sequence[Candidate], trials: int) -> Entry:
    """An arm with its trials: points of the common settings and of all its members' own."""
    own = {(m.recipe.name, setting): values for m in members for setting, values in m.recipe.space.items()}
    space: Space = {**COMMON, **{f"{name}.{setting}": values for (name, setting), values in own.items()}}
    tried = []
    for point in points(space, trials):
        of_members: dict[str, dict[str, Any]] = {member.recipe.name: {} for member in members}
        for name, setting in own:
            of_members[name][setting] = point[f"{name}.{setting}"]
        tried.append({**{name: point[name] for name in COMMON}, "own": of_members})
    name = " + ".join(member.recipe.name for member in members)
    return Entry(name, tuple(members), tuple(tried), tuple(member.reference for member in members))


class Matrix:
    """Makes the runs that are missing, and finds them.

    Args:
        base: settings that all runs share.
        plan: how many trials and splits.
        store: where runs are kept.
        workers: parallel processes.
        fresh: make runs again that are there.
        progress: show how far it is.
        pool: what makes them.

    Attributes:
        reused: runs that were there from earlier calls.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        plan: Plan,
        store: Store,
        *,
        workers: int,
        fresh: bool,
        progress: bool,
        pool: Callable[..., AnyPool],
    ) -> None:
        self.base = base
        self.plan = plan
        self.apart: bool = pool is not Here  # each run's memory is its own process's
        self.reused: int = 0
        self._store = store
        self._options: dict[str, Any] = {"workers": workers, "fresh": fresh, "progress": progress, "pool": pool}
        self._runs: dict[tuple[str, int], list[Run | None]] = {}

    def run(self, entries: Sequence[Entry]) -> None:
        """Make the runs of some arms, split by split, so that an interrupted comparison has whole splits."""
        jobs = [
            Job(
                "trial",
                split,
                "comparison",
                entry.settings(self.base, trial),
                f"{entry.name}, split {split + 1}, trial {trial + 1}",
            )
            for split in range(self.plan.splits)
            for trial in range(self.plan.trials)
            for entry in entries
        ]
        runs, failures, reused = run_jobs(_SLUG, _MODULE, jobs, store=self._store, **self._options)
        self.reused += reused
        if not runs and failures:
            raise ValueError(f"every training failed; the first: {failures[0].error}")
        found = {(canonical(run.overrides), run.seed): run for run in runs}
        for entry in entries:
            tried = [canonical(entry.settings(self.base, trial)) for trial in range(self.plan.trials)]
            for split in range(self.plan.splits):
                self._runs[entry.name, split] = [found.get((settings, split)) for settings in tried]

    def runs(self, entry: Entry, split: int) -> list[Run | None]:
        """Those of an arm in a split, by trial; None where one failed."""
        return self._runs[entry.name, split]

    def chosen(self, entry: Entry, metric: str) -> list[Run | None]:
        """For each split the run of the trial whose validation metric is best."""
        picked = []
        for split in range(self.plan.splits):
            runs = self.runs(entry, split)
            values = [math.nan if run is None else run.metrics[f"validation_{metric}"] for run in runs]
            best = best_trial(values, METRICS[metric].direction)
            picked.append(None if best is None else runs[best])
        return picked

    def values(self, entry: Entry, metric: str, part: str, deciding: str) -> list[float]:
        """A metric on a part in each split, with the trial that the deciding metric chose."""
        return [math.nan if run is None else run.metrics[f"{part}_{metric}"] for run in self.chosen(entry, deciding)]
