"""Learn tasks one after the other with any terms, measure what is forgotten, go on after an interruption."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from regularized.continual.forgetting import Forgetting
from regularized.continual.tasks import Task
from regularized.mechanisms.ranges import allowed, count
from regularized.training.options import Compute, Logging
from regularized.training.progress import Coefficient
from regularized.training.state import restore, state_of
from regularized.training.trainer import Trainer

__all__ = ["TaskSequence"]


class TaskSequence:
    """A model learns tasks in their order; each has a training of its own, with a new optimizer.

    Args:
        model: changed in place.
        tasks: the whole sequence, each with a ``test``.
        terms: of the loss, by name; those that remember tasks are told of them. The same terms for all tasks.
        optimizer: builds the optimizer of a list of parameter groups; called for each task.
        epochs: of each task.
        schedule: factor on the learning rates; it begins anew with each task. Default 1.
        seed: of what is drawn; each task has its own from it.
        compute: device and precision; default the CPU.

    Attributes:
        record: accuracies after each task.
        done: tasks that are learnt.

    Raises:
        ValueError: there is no task, or one without test data; sharding is asked for.

    Examples:
        >>> from functools import partial
        >>> from regularized.continual.rehearsal_free import ContinualLoss
        >>> from regularized.continual.tasks import class_groups, class_incremental
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.eye(4).repeat(16, 1), torch.arange(4).repeat(16)
        >>> tasks = class_incremental((x, y), class_groups(4, 2), test=(x, y))
        >>> adam = partial(torch.optim.Adam, lr=0.1)
        >>> sequence = TaskSequence(nn.Linear(4, 4), tasks, terms={"task": ContinualLoss(4)}, optimizer=adam, epochs=20)
        >>> sequence.fit().final_accuracy
        1.0
    """

    @allowed(epochs=count(1))
    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        *,
        terms: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        epochs: int,
        schedule: Coefficient = 1.0,
        seed: int = 0,
        compute: Compute | None = None,
    ) -> None:
        if not tasks:
            raise ValueError("a sequence needs at least one task")
        if compute is not None and compute.sharding != "no":
            raise ValueError(
                f"tasks are learnt one after the other on whole weights, got Compute(sharding={compute.sharding!r}); "
                'give sharding="no"'
            )
        self.model: nn.Module = model
        self.tasks: tuple[Task, ...] = tuple(tasks)
        self.terms: nn.ModuleDict = nn.ModuleDict(terms)
        self.record: Forgetting = Forgetting(tasks)
        self.done: int = 0
        self._optimizer = optimizer
        self._epochs = epochs
        self._schedule = schedule
        self._seed = seed
        self._compute = Compute(device="cpu") if compute is None else compute
        self._trainer()  # the terms see the model as it is before the first task

    def fit(self, *, until: int | None = None) -> Forgetting:
        """Learn the tasks that are left.

        Args:
            until: stop when so many tasks are learnt in all; default all.

        Returns:
            The record.

        Raises:
            NonFiniteLoss: a training diverged.
        """
        for task in self.tasks[self.done : until]:
            self._trainer(task.number).fit(task.data, epochs=self._epochs, task=task)
            self.record.measure(self.model, after=task.number)
            self.done += 1
        return self.record

    def _trainer(self, number: int = 0) -> Trainer:
        return Trainer(
            self.model,
            terms=dict(self.terms.items()),
            optimizer=self._optimizer,
            schedule=self._schedule,
            seed=self._seed + number,
            logging=Logging(every=0, progress_bar=False),
            compute=self._compute,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that the tasks left behind; to be taken between two calls of :meth:`fit`."""
        return state_of(self, "model", "terms", "record", "done")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, exactly.

        Raises:
            ValueError: the state is of another sequence.
        """
        restore(self, state, "model", "terms", "record", "done")
