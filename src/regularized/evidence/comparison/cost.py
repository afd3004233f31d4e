"""What a technique costs on the user's own network and data: short trainings, plain and with it, in turns.

Not by the seconds of the runs: these were made side by side with others, at other times.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from typing import Any, NamedTuple

import torch

from regularized.evidence.comparison.experiment import train
from regularized.evidence.comparison.problem import Problem, Units
from regularized.evidence.comparison.recipe import load_recipe
from regularized.training.finite import NonFiniteLoss

__all__ = ["Cost", "measure_costs"]

_STEPS = 12  # of a short training
_ROUNDS = 3


class Cost(NamedTuple):
    """Seconds of a step, plain and with a technique.

    Attributes:
        step_seconds: of a plain step.
        ratios: of a step with each arm over a plain one.
    """

    step_seconds: float
    ratios: Mapping[str, float]


def measure_costs(problem: Problem, settings: Mapping[str, Mapping[str, Any]], *, baseline: str = "plain") -> Cost:
    """Time short trainings of all arms in turns; whole ones of those that know no steps, shared out over plain steps.

    Args:
        problem: the problem.
        settings: of each arm, those of one of its trials.
        baseline: the plain arm.

    Raises:
        Exception: what an arm raises when it cannot be trained on this problem.
    """
    batch_size, epochs = settings[baseline]["batch_size"], settings[baseline]["epochs"]
    whole = {arm for arm, of in settings.items() if not all(load_recipe(r).by_steps for r, _ in of["recipes"])}
    inputs, targets = problem.prepared(problem.split(0))
    rows = slice(0, min(len(inputs["train"]), _STEPS // 2 * batch_size))
    units = Units.of(targets["train"])
    short = {**inputs, "train": inputs["train"][rows]}
    scaled = {part: units.scaled(y) for part, y in targets.items()}
    steps = 2 * -(-len(short["train"]) // batch_size)  # two epochs: some techniques do something else in the second

    def seconds(arm: str) -> float:
        start = time.perf_counter()
        with suppress(NonFiniteLoss):  # a trial that diverges is a result of the comparison, not of this
            if arm in whole:
                train(settings[arm], 0, problem, inputs, scaled)
            else:
                train({**settings[arm], "epochs": 2}, 0, problem, short, {**scaled, "train": scaled["train"][rows]})
        spent = time.perf_counter() - start
        return spent * steps / (epochs * -(-len(inputs["train"]) // batch_size)) if arm in whole else spent

    with _one_thread():
        for arm in settings:
            seconds(arm)
        times: dict[str, list[float]] = {arm: [] for arm in settings}
        for number in range(_ROUNDS):
            for arm in _turned(list(settings), number):
                times[arm].append(seconds(arm))
    plain = median(times[baseline])
    ratios = {arm: median(one / base for one, base in zip(of, times[baseline])) for arm, of in times.items()}
    return Cost(plain / steps, ratios)


def _turned(arms: Sequence[str], number: int) -> Sequence[str]:
    return arms if number % 2 == 0 else arms[::-1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread, as runs have it; then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
