"""Before the first run: who takes part, what it will take, and what fits into a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regularized.evidence.comparison.cost import Cost
from regularized.evidence.comparison.matrix import Candidate, Entry
from regularized.evidence.comparison.metrics import METRICS
from regularized.evidence.comparison.models import Factory, check_output, describe_default, make, source_of
from regularized.evidence.comparison.problem import Problem
from regularized.evidence.comparison.recipe import ANY_PROBLEM
from regularized.evidence.comparison.result import Plan
from regularized.evidence.comparison.training import OPTIMIZERS

__all__ = ["PLAIN", "check", "choose", "make_plan", "within"]

PLAIN = "plain"
_LEAST_SPLITS, _LEAST_TRIALS = 3, 4


def check(problem: Problem, metric: str, trials: int, splits: int, optimizer: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        ValueError: an argument is out of its range; the message says what there is.
    """
    fitting = [name for name, about in METRICS.items() if about.task == problem.task]
    if metric not in fitting:
        raise ValueError(f"metric {metric!r} does not fit {problem.task}; there are {fitting}")
    if trials < 1:
        raise ValueError(f"each arm needs a trial at least, got trials={trials}")
    if splits < _LEAST_SPLITS:
        raise ValueError(f"fewer than {_LEAST_SPLITS} splits say nothing, got splits={splits}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f'optimizer must be "sgd" or "adamw", got {optimizer!r}')


def choose(
    problem: Problem,
    candidates: Sequence[Candidate],
    make_model: Factory | None,
    family: str,
    asked: Sequence[str] | None,
) -> tuple[list[Candidate], dict[str, str]]:
    """Who takes part, plain first; and who does not, with the reason.

    Raises:
        ValueError: a name is unknown, nothing is left, or the network does not fit the data.
    """
    known = {candidate.recipe.name: candidate for candidate in candidates}
    if unknown := sorted(set(asked or ()) - set(known)):
        raise ValueError(f"no recipe is named {unknown}; there are {sorted(known)}")
    model = make(source_of(make_model).to_dict(), problem.input_shape, problem.num_outputs)
    inputs, _ = problem.prepared(problem.split(0))
    check_output(model, inputs["train"][:4], problem.num_outputs)
    chosen, left_out = [known[PLAIN]], {}
    for name, candidate in known.items():
        recipe = candidate.recipe
        if name == PLAIN:
            continue
        wanted = name in asked if asked is not None else bool(recipe.problems & {ANY_PROBLEM, family})
        obstacles = recipe.obstacles(problem.task, problem.input_shape, model)
        if wanted and not obstacles:
            chosen.append(candidate)
        elif obstacles:
            left_out[name] = "; ".join(obstacles)
        elif asked is None:
            left_out[name] = f"it is for {', '.join(sorted(recipe.problems)).replace('_', ' ')}; ask for it by name"
    if len(chosen) == 1:
        raise ValueError(f"nothing can be compared with the plain network here: {left_out}")
    return chosen, left_out


def make_plan(
    problem: Problem,
    base: Mapping[str, Any],
    costs: Cost,
    entries: Sequence[Entry],
    left_out: Mapping[str, str],
    *,
    trials: int,
    splits: int,
    workers: int,
) -> Plan:
    """What is going to be done, and how long it will take by what steps took just now.

    Args:
        problem: the data.
        base: settings that all runs share.
        costs: of a step of each arm.
        entries: the arms.
        left_out: reasons, by name.
        trials: for each arm in each split.
        splits: how many.
        workers: how many runs at a time.
    """
    sizes = problem.sizes()
    steps = base["epochs"] * -(-sizes["train"] // base["batch_size"])
    words = "yours" if base["model"]["reference"] else describe_default(problem.input_shape)
    count = sum(p.numel() for p in make(base["model"], problem.input_shape, problem.num_outputs).parameters())
    outputs = f"{problem.num_outputs} classes" if problem.task == "classification" else "regression"
    seconds = costs.step_seconds * steps * sum(costs.ratios[entry.name] for entry in entries) * trials * splits
    return Plan(
        data=f"{problem.name}, {len(problem.inputs):,} samples, {outputs}",
        model=f"{words}, {count:,} weights",
        arms=tuple(entry.name for entry in entries),
        left_out=left_out,
        trials=trials,
        splits=splits,
        epochs=base["epochs"],
        sizes=sizes,
        runs=len(entries) * trials * splits,
        seconds=seconds / workers,
        workers=workers,
    )


def within(plan: Plan, budget: float) -> Plan:
    """The plan with fewer splits, then fewer trials, until its estimate is within a budget of seconds.

    Raises:
        ValueError: even the least takes longer.
    """
    whole = plan.seconds / plan.runs
    splits, trials = plan.splits, plan.trials

    def needs() -> float:
        return whole * len(plan.arms) * trials * splits

    while needs() > budget and splits > _LEAST_SPLITS:
        splits -= 1
    while needs() > budget and trials > _LEAST_TRIALS:
        trials -= 1
    if needs() > budget:
        raise ValueError(
            f"{len(plan.arms)} arms with {trials} trials in {splits} splits take about {needs():.0f} s, more than the "
            f"budget of {budget:.0f} s; compare fewer candidates, or give it more time"
        )
    return replace(plan, splits=splits, trials=trials, runs=len(plan.arms) * trials * splits, seconds=needs())
