"""Tasks one after the other: what a task is, how a data set becomes a sequence of them, and which classes were seen.

A :class:`Task` is what :meth:`Trainer.fit(..., task=...) <regularized.training.Trainer.fit>` hands to the terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regularized.training.data import TensorData

__all__ = ["SeenClasses", "Task", "class_groups", "class_incremental", "domain_incremental"]


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a sequence.

    Args:
        number: position in the sequence, from 0.
        classes: labels that occur in it, as the model's head counts them.
        data: what the training takes: a :class:`~regularized.training.data.TensorData`, a ``DataLoader``, ...
        test: inputs and labels on which the task is judged; None where nothing is measured.
    """

    number: int
    classes: tuple[int, ...]
    data: Any
    test: tuple[Tensor, Tensor] | None = None


def class_groups(num_classes: int, sizes: int | Sequence[int], *, seed: int | None = None) -> list[tuple[int, ...]]:
    """Classes dealt to tasks.

    Args:
        num_classes: labels 0 ... num_classes - 1.
        sizes: classes of each task; one number for tasks of equal size.
        seed: of the order; None (default) takes the labels in their own.

    Raises:
        ValueError: the sizes do not add up to the number of classes.

    Examples:
        >>> class_groups(6, 2), class_groups(5, [3, 2])
        ([(0, 1), (2, 3), (4, 5)], [(0, 1, 2), (3, 4)])
    """
    if isinstance(sizes, int):
        sizes = [sizes] * (num_classes // sizes if sizes > 0 else 0)
    if sum(sizes) != num_classes or min(sizes, default=0) < 1:
        raise ValueError(
            f"tasks of {list(sizes)} classes do not make {num_classes}; give sizes that add up, such as "
            f"{[num_classes - num_classes // 2, num_classes // 2]}"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    order = range(num_classes) if seed is None else torch.randperm(num_classes, generator=generator).tolist()
    dealt = iter(order)
    return [tuple(next(dealt) for _ in range(size)) for size in sizes]


def class_incremental(
    train: tuple[Tensor, Tensor],
    groups: Sequence[Sequence[int]],
    *,
    test: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Task]:
    """Each task brings classes that no other has; nothing says at test time which task a sample is of.

    Args:
        train: inputs (N, ...) and labels (N,).
        groups: classes of each task, see :func:`class_groups`.
        test: inputs and labels of the test set, which is divided likewise.
        batch_size: default 64.
        seed: of the order of samples.

    Raises:
        ValueError: a class is in two tasks; or a task has no sample.

    Examples:
        >>> x, y = torch.arange(6.0)[:, None], torch.tensor([0, 1, 2, 0, 1, 2])
        >>> [(task.classes, len(task.data.inputs)) for task in class_incremental((x, y), [(0, 2), (1,)])]
        [((0, 2), 4), ((1,), 2)]
    """
    seen: set[int] = set()
    tasks = []
    for number, group in enumerate(groups):
        if twice := sorted(seen & set(group)):
            raise ValueError(f"class {twice[0]} is in two tasks; class-incremental tasks share none")
        seen |= set(group)
        x, y = _only(train, group)
        if not len(x):
            raise ValueError(f"task {number} with the classes {tuple(group)} has no training sample")
        data = TensorData(x, y, batch_size=min(batch_size, len(x)), seed=seed + number)
        tasks.append(Task(number, tuple(group), data, None if test is None else _only(test, group)))
    return tasks


def domain_incremental(
    train: Sequence[tuple[Tensor, Tensor]],
    *,
    test: Sequence[tuple[Tensor, Tensor]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Task]:
    """Each task has the same classes in another guise: rotated, of another sensor, of another year.

    Args:
        train: inputs and labels of each domain.
        test: the same for the test.
        batch_size: default 64.
        seed: of the order of samples.

    Raises:
        ValueError: there is not one test set for each domain.

    Examples:
        >>> x, y = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> [task.classes for task in domain_incremental([(x, y), (-x, y)])]
        [(0, 1), (0, 1)]
    """
    if test is not None and len(test) != len(train):
        raise ValueError(f"give a test set for each domain, or none: got {len(test)} for {len(train)}")
    return [
        Task(
            number,
            tuple(torch.unique(y).tolist()),
            TensorData(x, y, batch_size=min(batch_size, len(x)), seed=seed + number),
            None if test is None else test[number],
        )
        for number, (x, y) in enumerate(train)
    ]


def _only(data: tuple[Tensor, Tensor], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    x, y = data
    rows = torch.isin(y, torch.tensor(list(classes)))
    return x[rows], y[rows]


class SeenClasses(nn.Module):
    """Which classes were seen, in the order in which they came; its state is saved with the term that holds it.

    Args:
        num_classes: columns of the head.
        known: classes that the model knows before the first task.

    Attributes:
        num_old: classes of the tasks before this one.
        open: number of the task that has begun and has not ended, or None.

    Raises:
        ValueError: a class is out of range, or is named twice.

    Examples:
        >>> seen = SeenClasses(6)
        >>> seen.begin(Task(0, (4, 1), None)); seen.end(Task(0, (4, 1), None)); seen.begin(Task(1, (0,), None))
        >>> seen.columns.tolist(), seen.num_old, seen.positions(torch.tensor([0, 4])).tolist()
        ([4, 1, 0], 2, [2, 0])
    """

    def __init__(self, num_classes: int, known: Sequence[int] = ()) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_old: int = 0
        self.open: int | None = None
        self.columns: Tensor
        self._places: Tensor
        self.register_buffer("columns", torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("_places", torch.full((num_classes,), -1), persistent=False)
        self._add(known)
        self.num_old = len(known)

    @property
    def num_seen(self) -> int:
        """Classes of all tasks so far, the present one included."""
        return len(self.columns)

    def begin(self, task: Task, *, shared: bool = False) -> None:
        """A task begins.

        Args:
            task: the task.
            shared: whether its classes may have been seen before, as those of another domain.

        Raises:
            RuntimeError: the task before has not ended.
            ValueError: a class is out of range, or was seen before.
        """
        if self.open is not None:
            raise RuntimeError(
                f"there is no anchor for task {task.number}: task {self.open} has not ended. Let the loop call "
                "task_end (Trainer does, at the end of fit(..., task=task)) before it begins the next"
            )
        old = set(self.columns.tolist())
        if (again := sorted(old & set(task.classes))) and not shared:
            raise ValueError(
                f"class {again[0]} of task {task.number} was in a task before, and the previous model would be asked "
                "about it as an old one; give tasks disjoint classes"
            )
        self.num_old = len(old)
        self._add([c for c in task.classes if c not in old])
        self.open = task.number

    def end(self, task: Task) -> None:
        """A task ends: all classes so far are old ones.

        Raises:
            RuntimeError: it has not begun.
        """
        if self.open is None:
            raise RuntimeError(f"task {task.number} ends, but has not begun; call task_start first")
        self.num_old, self.open = self.num_seen, None

    def positions(self, targets: Tensor) -> Tensor:
        """Labels as positions among the classes seen.

        Raises:
            ValueError: a label is of no class seen (looked at on the CPU only, where it costs nothing).
        """
        places = self._places[targets]
        if not targets.is_cuda and bool((places < 0).any()):
            label = int(targets[places < 0][0])
            raise ValueError(
                f"label {label} is none of the classes of the tasks so far, {sorted(self.columns.tolist())}; name it "
                "in its task's `classes`"
            )
        return places

    def _add(self, classes: Sequence[int]) -> None:
        for c in classes:
            if not 0 <= c < self.num_classes:
                raise ValueError(f"class {c} is not in 0 to {self.num_classes - 1}, the columns of the head")
        if len(set(classes)) < len(classes):
            raise ValueError(f"a class is named twice in {tuple(classes)}")
        new = torch.tensor(list(classes), dtype=torch.int64, device=self.columns.device)
        self._places[new] = torch.arange(self.num_seen, self.num_seen + len(new), device=new.device)
        self.columns = torch.cat([self.columns, new])

    def get_extra_state(self) -> Tensor:
        """Old and open, then the classes in order, and -1 for those to come."""
        head = [self.num_old, -1 if self.open is None else self.open]
        rest = [-1] * (self.num_classes - self.num_seen)
        return torch.tensor([*head, *self.columns.tolist(), *rest], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a saved order."""
        old, opened, *classes = state.tolist()
        self.columns = self.columns[:0]
        self._places.fill_(-1)
        self._add([c for c in classes if c >= 0])
        self.num_old, self.open = old, None if opened < 0 else opened
