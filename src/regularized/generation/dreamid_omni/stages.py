"""Three stages: reconstruct one's own references, learn those of other clips, then all tasks together."""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regularized.mechanisms.ranges import check_fields, count
from regularized.training.randomness import mix

__all__ = ["ProgressivePlan", "Stage"]


@dataclass(frozen=True, slots=True)
class Stage:
    """Some steps with one way of pairing and one mixture of tasks.

    Args:
        pairing: ``"in_pair"``: references are cut from the target clip, and the loss does not look where; or
            ``"cross_pair"``: they come from another clip of the same person.
        steps: how many.
        tasks: how often each task is taken, in whole numbers: ``{"r2av": 4, "rv2av": 3, "ra2v": 3}``.

    Raises:
        ValueError: a number below 1, or an unknown pairing.

    Examples:
        >>> Stage("in_pair", 300, {"r2av": 1}).steps
        300
    """

    pairing: str
    steps: int
    tasks: Mapping[str, int]

    def __post_init__(self) -> None:
        check_fields(self, steps=count(1))
        if self.pairing not in ("in_pair", "cross_pair"):
            raise ValueError(f"pairing must be 'in_pair' or 'cross_pair', got {self.pairing!r}")
        if not self.tasks:
            raise ValueError("a stage needs a task")
        for task, times in self.tasks.items():
            count(1, "how often it is taken")(f"the task {task}", times)


@dataclass(frozen=True, slots=True)
class ProgressivePlan:
    """Which stage and task each step has.

    Tasks are shuffled in rounds: of 4 : 3 : 3, each ten steps hold exactly four, three and three. The order is a
    function of the seed and the step, so a training that goes on in the middle needs no state for it.

    Args:
        stages: in order.
        seed: of the order of tasks; default 0.

    Raises:
        ValueError: there is no stage.

    Examples:
        >>> plan = ProgressivePlan([Stage("in_pair", 2, {"r2av": 1}), Stage("cross_pair", 4, {"r2av": 1, "ra2v": 1})])
        >>> len(plan), [stage.pairing for stage, _ in (plan.at(1), plan.at(2))]
        (6, ['in_pair', 'cross_pair'])
        >>> sorted(task for _, (_, task) in list(plan)[2:4])
        ['r2av', 'ra2v']
    """

    stages: Sequence[Stage]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a plan needs a stage")

    @classmethod
    def published(cls, *, scale: float = 1.0, seed: int = 0) -> "ProgressivePlan":
        """The paper's: 10,000 steps in pairs, 20,000 across, 20,000 of all tasks, 4 : 3 : 3.

        Args:
            scale: factor on the numbers of steps; default 1.
            seed: of the order of tasks; default 0.

        Examples:
            >>> [stage.steps for stage in ProgressivePlan.published(scale=0.01).stages]
            [100, 200, 200]
        """
        steps = [max(1, round(scale * number)) for number in (10_000, 20_000, 20_000)]
        tasks = ({"r2av": 1}, {"r2av": 1}, {"r2av": 4, "rv2av": 3, "ra2v": 3})
        pairings = ("in_pair", "cross_pair", "cross_pair")
        return cls([Stage(pairing, number, mixture) for pairing, number, mixture in zip(pairings, steps, tasks)], seed)

    def __len__(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, str]:
        """Stage and task of a step, counted from 0 over all stages.

        Raises:
            IndexError: the plan is over, or has not begun.
        """
        inside = step
        for number, stage in enumerate(self.stages):
            if 0 <= inside < stage.steps:
                order = [task for task, times in sorted(stage.tasks.items()) for _ in range(times)]
                turn, place = divmod(inside, len(order))
                random.Random(mix(self.seed, number, turn)).shuffle(order)
                return stage, order[place]
            inside -= stage.steps
        raise IndexError(f"the plan has the steps 0 to {len(self) - 1}, got {step}")

    def __iter__(self) -> Iterator[tuple[int, tuple[Stage, str]]]:
        """Steps with their stage and task."""
        return ((step, self.at(step)) for step in range(len(self)))

    def check(self, supplied: Collection[str]) -> None:
        """Compare with the tasks that the data can supply.

        Raises:
            ValueError: a stage has another one.
        """
        for number, stage in enumerate(self.stages, start=1):
            if unknown := sorted(set(stage.tasks) - set(supplied)):
                raise ValueError(
                    f"stage {number} of the plan has the tasks {unknown}, which the data cannot supply; they have "
                    f"{sorted(supplied)}"
                )

    def settings(self) -> dict[str, Any]:
        """The plan as plain values."""
        stages = [{"pairing": s.pairing, "steps": s.steps, "tasks": dict(s.tasks)} for s in self.stages]
        return {"stages": stages, "seed": self.seed}
