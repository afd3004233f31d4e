"""OVOR in the loop: the loss of the first phase, and the second phase at the end of each task.

Both are told of tasks by the loop: ``Trainer.fit(data, task=task)`` and
:class:`~regularized.continual.sequence.TaskSequence`, or ``task_start`` and ``task_end`` by hand.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regularized.continual.ovor.features import extract_features
from regularized.continual.ovor.head import ADAM, VirtualOutlierRegularizer
from regularized.continual.ovor.loss import task_cross_entropy
from regularized.continual.tasks import SeenClasses, Task
from regularized.mechanisms.ranges import allowed, count
from regularized.training.data import as_source
from regularized.training.progress import Coefficient
from regularized.training.randomness import mix
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["HeadPhase", "TaskCrossEntropy"]


class TaskCrossEntropy(Term):
    """Cross-entropy over the classes of the present task alone; it takes the place of ``CrossEntropy``.

    Rows of the head for other classes get no gradient, so what was learnt of them stays.

    Args:
        num_classes: columns of the head, all tasks together.
        weight: coefficient; default 1.

    Attributes:
        seen: the classes in their order.

    Raises:
        ValueError: labels of another task, or a class in two tasks.
        RuntimeError: no task has begun, or one begins before the last has ended.

    Examples:
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> loss = TaskCrossEntropy(4)
        >>> loss.task_start(Task(0, (2, 3), None))
        >>> step = Step(nn.Identity(), Batch(torch.tensor([[9.0, 9.0, 0.0, 0.0]]), torch.tensor([2])), Progress(0, 1))
        >>> round(loss(step).item(), 4)
        0.6931
    """

    is_task = True
    sharding = "forward"

    @allowed(num_classes=count(1))
    def __init__(self, num_classes: int, *, weight: Coefficient = 1.0) -> None:
        super().__init__(weight=weight)
        self.seen = SeenClasses(num_classes)

    def task_start(self, task: Task) -> None:
        """Its classes are those that compete now."""
        self.seen.begin(task)

    def task_end(self, task: Task) -> None:
        """They are old ones."""
        self.seen.end(task)

    def forward(self, step: Step) -> Tensor:
        """Sum over the samples."""
        if self.seen.open is None:
            raise RuntimeError("no task has begun: the loop must call task_start, as Trainer.fit(..., task=task) does")
        logits, old = step.logits, self.seen.num_old
        if logits.shape[1] != self.seen.num_classes:
            raise ValueError(
                f"the head has {logits.shape[1]} columns, TaskCrossEntropy was given {self.seen.num_classes}"
            )
        places = self.seen.positions(step.targets) - old
        if not places.is_cuda and bool((places < 0).any()):
            raise ValueError(
                f"label {int(step.targets[places < 0][0])} is of an earlier task; the classes of task {self.seen.open} "
                f"are {self.seen.columns[old:].tolist()}"
            )
        return task_cross_entropy(logits, places, self.seen.columns[old:]).sum()

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"{self.seen.num_classes}, weight={self.weight}"


class HeadPhase(Term):
    """At the end of each task the head alone learns on, with outliers: the second phase of OVOR.

    It works with any network whose head is called with features, whatever loss the first phase has.

    Args:
        regularizer: the loss and its outliers.
        epochs: E2 >= 0; the paper has a fifth of all epochs: 4 after 16, or 10 after 40.
        optimizer: builds the optimizer of the head's parameters; default Adam with 1e-3. It is a new one, where the
            released code goes on with that of the first phase.
        schedule: factor on its rates; default 1. ``epoch_cosine(E1 + E2, start=E1)`` is the released code's.
        head: dotted name of the head; default ``"head"``.
        batch_size: default 128.
        cache: compute the features once (default). False: anew for each epoch, as data that are augmented want it.
        seed: of orders and outliers; each task has its own from it.

    Attributes:
        losses: (epochs, 2) of the last task, see
            :meth:`~regularized.continual.ovor.head.VirtualOutlierRegularizer.fit_head`; None before.

    Raises:
        AttributeError: the model has no such head.
        RuntimeError: a task ends before the term was given its model.

    Examples:
        >>> from collections import OrderedDict
        >>> from regularized.training.data import TensorData
        >>> model = nn.Sequential(OrderedDict(body=nn.Flatten(), head=nn.Linear(3, 4)))
        >>> phase = HeadPhase(VirtualOutlierRegularizer(weight=0.0), epochs=2)
        >>> phase.attach(model)
        >>> phase.task_end(Task(0, (1, 2), TensorData(torch.randn(8, 3), torch.tensor([1, 2] * 4), batch_size=4)))
        >>> phase.losses.shape
        torch.Size([2, 2])
    """

    contributes = False

    @allowed(epochs=count(0), batch_size=count(1))
    def __init__(
        self,
        regularizer: VirtualOutlierRegularizer,
        *,
        epochs: int,
        optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
        schedule: Coefficient = 1.0,
        head: str = "head",
        batch_size: int = 128,
        cache: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.regularizer = regularizer
        self.epochs = epochs
        self.head = head
        self.batch_size = batch_size
        self.cache = cache
        self.seed = seed
        self.losses: Tensor | None = None
        self._optimizer = optimizer
        self._schedule = schedule
        self._model: list[nn.Module] = []

    def attach(self, model: nn.Module) -> None:
        """Find the head."""
        model.get_submodule(self.head)
        self._model = [model]

    def task_end(self, task: Task) -> None:
        """The second phase, on all of the task's training data.

        Raises:
            ValueError: labels are of other classes, or there are too few samples; see ``fit_head``.
        """
        if not self._model:
            raise RuntimeError("HeadPhase belongs to no model yet: the loop must call attach(model) first")
        if not self.epochs:
            return
        (model,) = self._model
        source = as_source(task.data, seed=self.seed)

        def features(epoch: int) -> tuple[Tensor, Tensor]:
            return extract_features(model, source.batches(epoch), head=self.head)

        self.losses = self.regularizer.fit_head(
            model.get_submodule(self.head),
            *features(0),
            classes=task.classes,
            epochs=self.epochs,
            optimizer=self._optimizer,
            schedule=self._schedule,
            batch_size=self.batch_size,
            seed=mix(self.seed, task.number),
            refresh=None if self.cache else features,
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy belongs to no model yet."""
        return {**self.__dict__, "_model": []}

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"epochs={self.epochs}, head={self.head!r}, cache={self.cache}"
