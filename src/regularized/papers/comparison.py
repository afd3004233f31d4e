"""``compare``: which technique helps on given data. Recipes are found by scanning the papers' folders."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

from regularized.evidence.comparison import Candidate, Comparison, Plan, Problem, compare_problem, problem_of
from regularized.evidence.comparison.models import Factory
from regularized.evidence.comparison.planning import apart
from regularized.evidence.pool import AnyPool
from regularized.papers.card import FAMILIES
from regularized.papers.catalogue import load_catalogue

__all__ = ["candidates", "compare", "exclusive_pairs", "without_recipe"]

_BASELINES = "regularized.evidence.comparison.baselines"


def compare(
    make_model: Factory | None,
    data: Any,
    *,
    problem: str = "overfitting",
    target: str | None = None,
    candidates: Sequence[str] | None = None,
    metric: str | None = None,
    trials: int = 8,
    splits: int = 5,
    epochs: int | None = None,
    batch_size: int | None = None,
    optimizer: str = "sgd",
    budget: float | None = None,
    clean_test: Any = None,
    combine: bool = False,
    workers: int | None = None,
    fresh: bool = False,
    progress: bool = True,
    pool: Callable[..., AnyPool] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
) -> Comparison:
    """Which technique helps on these data: all tuned like the plain network, judged on samples that no choice saw.

    The answer may be that nothing does. Runs are kept: an interrupted comparison goes on where it was, and more trials
    or splits cost only what they add.

    Args:
        make_model: makes a new network of (B, classes) logits or (B, 1) predictions, from scratch; None for a
            perceptron or a small network of convolutions, by the kind of data. One that can be imported runs in
            parallel processes; one that is typed into a notebook runs in this process alone.
        data: (inputs, targets) as tensors or arrays, a data frame, a map-style ``Dataset`` of pairs or of
            dictionaries (as Hugging Face's), a path to a CSV, TSV, Parquet or NPZ file or to a folder of images by
            class; or a :class:`Problem`.
        problem: family of the problem, in its words or with underscores: ``"noisy labels"``, ``"overfitting"``
            (default), ...; decides who takes part.
        target: name of the target in a frame, file or dictionaries.
        candidates: names of techniques and baselines instead of those for the family; ``"dropout + mixup"`` is an arm
            with both.
        metric: that decides; default accuracy, or the root mean squared error for regression.
        trials: settings tried for each arm in each split; default 8.
        splits: how often the samples are dealt anew; default 5, at least 3.
        epochs: of a training; default as many as show about 60,000 samples, 10 to 100.
        batch_size: default 64, and 32 where fewer than 500 samples are trained on.
        optimizer: ``"sgd"`` (default; momentum 0.9) or ``"adamw"``.
        budget: seconds; splits, then trials are reduced until the estimate fits. Default none.
        clean_test: data with trusted targets, to judge on.
        combine: try what is best alone together, too.
        workers: parallel processes; default one for each usable core.
        fresh: make runs again that are there.
        progress: show how far it is.
        pool: what makes the runs, see :mod:`regularized.evidence.engines`: on a cluster all machines must see the
            folder of the data. Default processes on this machine.
        on_plan: called with the plan before the first run.

    Raises:
        ValueError: an argument is out of range, a name is unknown, or the data do not fit.
        TypeError: the data are of no known kind.
        Unavailable: a package that reads the file is missing.
        Interrupted: Ctrl-C; finished runs are kept, and the same call goes on from there.
    """
    family = problem.strip().lower().replace(" ", "_").replace("-", "_")
    if family not in FAMILIES:
        raise ValueError(f"problem {problem!r} is no family of problems; there are {sorted(FAMILIES)}")
    given = data if isinstance(data, Problem) else problem_of(data, target=target, clean_test=clean_test)
    return compare_problem(
        given,
        _all_candidates(),
        make_model=make_model,
        family=family,
        asked=candidates,
        metric=metric,
        trials=trials,
        splits=splits,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        budget=budget,
        combine=combine,
        workers=workers,
        fresh=fresh,
        progress=progress,
        pool=pool,
        on_plan=on_plan,
        source=_source(data, target),
    )


def _source(data: Any, target: str | None) -> str:
    """The line of the snippet that reads the data; empty where the words for tensors will do.

    Examples:
        >>> _source(Path("a.csv"), "y")
        "problem = problem_of('a.csv', target='y')"
        >>> _source([{"x": 1.0, "y": 0}], "y")
        "problem = problem_of(data, target='y')  # your list, as you gave it"
    """
    where = f", target={target!r}" if target is not None else ""
    if isinstance(data, str | Path):
        return f"problem = problem_of({str(data)!r}{where})"
    if isinstance(data, tuple | Problem):
        return ""
    return f"problem = problem_of(data{where})  # your {type(data).__name__}, as you gave it"


def candidates() -> tuple[Candidate, ...]:
    """All recipes there are: the baselines, then those of the papers.

    Examples:
        >>> [candidate.recipe.name for candidate in candidates()][:2]
        ['plain', 'early_stopping']
    """
    return _all_candidates()


def without_recipe() -> dict[str, str]:
    """Implemented papers that cannot enter a comparison, with the reason.

    Raises:
        ValueError: a paper has neither recipe nor reason.
    """
    reasons = {}
    for entry in load_catalogue():
        if entry.implemented:
            module = import_module(entry.module_name("recipe"))
            if not hasattr(module, "RECIPES"):
                reasons[entry.slug] = str(module.NO_RECIPE)
    return reasons


def exclusive_pairs() -> dict[frozenset[str], str]:
    """Recipes that cannot be one training, with the reason; all others may be combined.

    Examples:
        >>> exclusive_pairs()[frozenset({"label_smoothing", "mixup"})]
        "label_smoothing and mixup exclude each other: each takes the place of the task's loss"
    """
    found = {}
    for pair in combinations(_all_candidates(), 2):
        if reason := apart(pair, "classification", (1, 8, 8), 2):
            found[frozenset(member.recipe.name for member in pair)] = reason
    return found


@cache
def _all_candidates() -> tuple[Candidate, ...]:
    names = [_BASELINES]
    names += [entry.module_name("recipe") for entry in load_catalogue() if entry.implemented]
    found = []
    for name in names:
        if importlib.util.find_spec(name) is not None:
            module = import_module(name)
            found += [Candidate(recipe, name) for recipe in getattr(module, "RECIPES", ())]
    return tuple(found)
