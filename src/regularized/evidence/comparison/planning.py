"""Before the first run: who takes part, what it will take, and what fits into a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from regularized.evidence.comparison.cost import Cost
from regularized.evidence.comparison.matrix import Candidate, Entry
from regularized.evidence.comparison.metrics import METRICS
from regularized.evidence.comparison.models import Factory, check_output, describe_default, make, source_of
from regularized.evidence.comparison.problem import Problem
from regularized.evidence.comparison.recipe import ANY_PROBLEM, Setup, Task
from regularized.evidence.comparison.result import Plan
from regularized.evidence.comparison.space import points
from regularized.evidence.comparison.training import OPTIMIZERS, gathered

__all__ = ["PLAIN", "apart", "check", "choose", "make_plan", "within"]

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
) -> tuple[list[tuple[Candidate, ...]], dict[str, str]]:
    """Who takes part, plain first; and who does not, with the reason. Names with ``+`` between are one arm together.

    Raises:
        ValueError: a name is unknown, nothing is left, or the network does not fit the data.
    """
    known = {candidate.recipe.name: candidate for candidate in candidates}
    together = [tuple(part.strip() for part in name.split("+")) for name in asked or ()]
    if unknown := sorted({name for names in together for name in names} - set(known)):
        raise ValueError(f"no recipe is named {unknown}; there are {sorted(known)}")
    model = make(source_of(make_model).to_dict(), problem.input_shape, problem.num_outputs)
    inputs, _ = problem.prepared(problem.split(0))
    check_output(model, inputs["train"][:4], problem.num_outputs)
    chosen: list[tuple[Candidate, ...]] = [(known[PLAIN],)]
    left_out: dict[str, str] = {}
    for name, candidate in known.items():
        recipe = candidate.recipe
        if name == PLAIN:
            continue
        wanted = (name,) in together if asked is not None else bool(recipe.problems & {ANY_PROBLEM, family})
        obstacles = recipe.obstacles(problem.task, problem.input_shape, model)
        if wanted and not obstacles:
            chosen.append((candidate,))
        elif obstacles:
            left_out[name] = "; ".join(obstacles)
        elif asked is None:
            left_out[name] = f"it is for {', '.join(sorted(recipe.problems)).replace('_', ' ')}; ask for it by name"
    for names in dict.fromkeys(names for names in together if len(names) > 1):
        members = tuple(known[name] for name in names)
        if obstacles := _obstacles(members, problem, model):
            left_out[" + ".join(names)] = "; ".join(obstacles)
        else:
            chosen.append(members)
    if len(chosen) == 1:
        raise ValueError(f"nothing can be compared with the plain network here: {left_out}")
    return chosen, left_out


def _obstacles(members: Sequence[Candidate], problem: Problem, model: nn.Module) -> list[str]:
    """Why recipes cannot be one arm together; empty where they can."""
    recipes = [member.recipe for member in members]
    found = [f"{r.name}: {o}" for r in recipes for o in r.obstacles(problem.task, problem.input_shape, model)]
    if len({recipe.name for recipe in recipes}) < len(recipes):
        found.append("it names a technique twice")
    elif not found and (reason := apart(members, problem.task, problem.input_shape, problem.num_outputs)):
        found.append(reason)
    return found


def apart(members: Sequence[Candidate], task: Task, input_shape: tuple[int, ...], num_outputs: int) -> str | None:
    """Why recipes cannot be one training; None where they can.

    Args:
        members: the candidates.
        task: of the problem.
        input_shape: of one input.
        num_outputs: classes, or 1.
    """
    recipes = [member.recipe for member in members]
    if own := [recipe.name for recipe in recipes if recipe.fit is not None]:
        return f"{' and '.join(own)} {'is' if len(own) == 1 else 'are each'} a training of its own"
    setup = Setup(task, 100, num_outputs, input_shape, 1, 10, 0)
    try:
        gathered(recipes, setup, {recipe.name: points(recipe.space, 1)[0] for recipe in recipes})
    except ValueError as reason:
        return str(reason)
    return None


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
