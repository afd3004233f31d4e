"""The objective as a term of the loop.

:mod:`regularized.scientific.deep_unfolding.layer` has the paper and its symbols.
"""

from collections.abc import Callable

from torch import Tensor

from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["RecoveryObjective"]


class RecoveryObjective(Term):
    """The objective as a term of the loop: the batch's inputs are measurements, the model's output signals.

    Targets are not looked at. For supervised training use ``Loss`` with a squared error.

    Args:
        objective: for example :class:`SparseObjective`, called as ``objective(x, y)`` for one value a signal.
        weight: coefficient; default 1.

    Raises:
        ValueError: the objective returned another shape than one value a signal.

    Examples:
        >>> import torch
        >>> from regularized.scientific.deep_unfolding import SparseObjective, UnfoldedISTA
        >>> from regularized.training.progress import Progress
        >>> from regularized.training.step import Batch
        >>> matrix, y = torch.eye(2), torch.tensor([[3.0, 0.0]])
        >>> step = Step(UnfoldedISTA(matrix, 0.5, layers=1), Batch.of({"inputs": y}), Progress(0, 1))
        >>> RecoveryObjective(SparseObjective(matrix, 0.5))(step).item()
        1.375
    """

    sharding = "forward"

    def __init__(self, objective: Callable[[Tensor, Tensor], Tensor], *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.objective = objective

    def forward(self, step: Step) -> Tensor:
        """Sum of the objective over the signals of the batch."""
        values = self.objective(step.logits, step.batch.inputs)
        if values.shape != (step.batch.size,):
            raise ValueError(f"the objective must return one value a signal, got shape {tuple(values.shape)}")
        return values.sum()
