"""How much is forgotten: accuracy after each task on each task, with and without being told which task it is.

``R[i, n]``: accuracy on task ``n`` after task ``i`` over all classes seen by then; ``A[i, n]``: the same given the
task, over its own classes alone. Rows are times, columns are tasks; what is above the diagonal is not used.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from regularized.continual.tasks import Task
from regularized.training.step import call_model

__all__ = ["Forgetting", "global_forgetting", "local_forgetting"]


def global_forgetting(accuracy: Tensor, sizes: Sequence[int]) -> Tensor:
    """The paper's F^G: how far accuracy over all classes fell, at each time, weighted by classes.

    ``1/(N-1) sum_{i>=2} sum_{n<i} |T_n| / |T_1:i| (R_nn - R_in)``; lower is better, and below 0 is possible.

    Args:
        accuracy: R, (N, N).
        sizes: classes of each task.

    Raises:
        ValueError: fewer than two tasks, or not one size for each.

    Examples:
        >>> global_forgetting(torch.tensor([[1.0, 0.0], [0.4, 0.9]]), [2, 2]).item()  # (1 - 0.4) x 2 / 4
        0.30000001192092896
    """
    _check(accuracy, sizes)
    counts = torch.as_tensor(list(sizes), dtype=accuracy.dtype)
    shares = counts[None, :] / counts.cumsum(0)[:, None]
    fall = (accuracy.diagonal()[None, :] - accuracy) * shares
    return fall.tril(diagonal=-1).sum() / (len(accuracy) - 1)


def local_forgetting(accuracy: Tensor) -> Tensor:
    """The paper's F^L: how far accuracy given the task fell from its own time to the end, mean over tasks.

    ``1/(N-1) sum_{n<N} (A_nn - A_Nn)``; a review prints the sign reversed, which contradicts "lower is better".

    Args:
        accuracy: A, (N, N).

    Raises:
        ValueError: fewer than two tasks.

    Examples:
        >>> round(local_forgetting(torch.tensor([[1.0, 0.0], [0.75, 0.9]])).item(), 4)
        0.25
    """
    _check(accuracy, None)
    return (accuracy.diagonal() - accuracy[-1])[:-1].mean()


def _check(accuracy: Tensor, sizes: Sequence[int] | None) -> None:
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or len(accuracy) < 2:
        raise ValueError(f"accuracy must be (N, N) for N >= 2 tasks, got {tuple(accuracy.shape)}")
    if sizes is not None and len(sizes) != len(accuracy):
        raise ValueError(f"give the number of classes of each of {len(accuracy)} tasks, got {len(sizes)}")


class Forgetting:
    """Records both matrices while a model learns its tasks.

    Args:
        tasks: the whole sequence, each with a ``test``.

    Attributes:
        whole: R, (N, N) float64; NaN until measured.
        given_task: A, (N, N).

    Raises:
        ValueError: a task has no test data.

    Examples:
        >>> from regularized.continual.tasks import class_incremental
        >>> x, y = torch.eye(4), torch.arange(4)
        >>> tasks = class_incremental((x, y), [(0, 1), (2, 3)], test=(x, y))
        >>> record = Forgetting(tasks)
        >>> record.measure(nn.Identity(), after=0); record.measure(nn.Identity(), after=1)
        >>> record.final_accuracy, record.global_forgetting, record.local_forgetting
        (1.0, 0.0, 0.0)
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            if task.test is None:
                raise ValueError(f"task {task.number} has no test data, so nothing can be said of what is forgotten")
        self.tasks: tuple[Task, ...] = tuple(tasks)
        self.whole: Tensor = torch.full((len(tasks), len(tasks)), torch.nan, dtype=torch.float64)
        self.given_task: Tensor = self.whole.clone()

    @torch.no_grad()
    def measure(self, model: nn.Module, *, after: int) -> None:
        """Fill the row of a time: all tasks up to number ``after``. The model's mode is as before afterwards."""
        training = model.training
        model.eval()
        seen = torch.tensor(sorted({c for task in self.tasks[: after + 1] for c in task.classes}))
        for number, task in enumerate(self.tasks[: after + 1]):
            assert task.test is not None
            x, y = task.test
            logits = call_model(model, x).cpu()
            for matrix, classes in ((self.whole, seen), (self.given_task, torch.tensor(sorted(task.classes)))):
                found = classes[logits[:, classes].argmax(dim=1)]
                matrix[after, number] = (found == y.cpu()).double().mean()
        model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """Both matrices."""
        return {"whole": self.whole, "given_task": self.given_task}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them over.

        Raises:
            ValueError: they are of another number of tasks.
        """
        for name, matrix in self.state_dict().items():
            if state[name].shape != matrix.shape:
                raise ValueError(f"{name} is of {len(state[name])} tasks there and of {len(matrix)} here")
            matrix.copy_(state[name])

    @property
    def sizes(self) -> list[int]:
        """Classes of each task."""
        return [len(task.classes) for task in self.tasks]

    @property
    def final_accuracy(self) -> float:
        """The paper's A_1:N: accuracy at the end over all test samples, the task unknown."""
        counts = torch.tensor([len(task.test[0]) for task in self.tasks if task.test is not None], dtype=torch.float64)
        return float((self.whole[-1] * counts).sum() / counts.sum())

    @property
    def global_forgetting(self) -> float:
        """See :func:`global_forgetting`."""
        return float(global_forgetting(self.whole.nan_to_num(0.0), self.sizes))

    @property
    def local_forgetting(self) -> float:
        """See :func:`local_forgetting`."""
        return float(local_forgetting(self.given_task.nan_to_num(0.0)))
