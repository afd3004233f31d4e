"""The penalty of all solves in a model as a term of the loss, and its annealing.

:mod:`regularized.scientific.ode_regularization.penalty` has the paper and its symbols.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.mechanisms.ranges import above, allowed
from regularized.scientific.ode_regularization.layer import SolverLayer
from regularized.scientific.ode_regularization.penalty import KIND, REDUCTION, Kind, Reduction, solver_penalty
from regularized.training.progress import Coefficient, Progress, Schedule
from regularized.training.step import Step
from regularized.training.terms import Term

__all__ = ["SolverRegularization", "exponential_decay"]


@dataclass(frozen=True, slots=True)
class _ExponentialDecay:
    start: float
    end: float

    def __call__(self, progress: Progress) -> float:
        share = progress.epoch / progress.total_epochs if progress.total_epochs else 0.0
        value: float = self.start * (self.end / self.start) ** min(share, 1.0)
        return value


@allowed(start=above(0.0), end=above(0.0))
def exponential_decay(start: float, end: float) -> Schedule:
    """The paper's annealing: ``start exp(-k epoch)``, which would be ``end`` after the last epoch.

    Args:
        start: coefficient in the first epoch, > 0; the paper's MNIST has 100.
        end: > 0; there 10.

    Raises:
        ValueError: a value is not positive.

    Examples:
        >>> decay = exponential_decay(100.0, 10.0)
        >>> [round(decay(Progress(0, 1, epoch=e, total_epochs=4)), 2) for e in (0, 2, 4)]
        [100.0, 31.62, 10.0]
    """
    return _ExponentialDecay(start, end)


class SolverRegularization(Term):
    """The penalty of all :class:`NeuralODE` and :class:`NeuralSDE` layers of a model, as a term of the loss.

    The errors are there anyway; their gradient costs some arithmetic on the state in each step, little beside a field
    that is not small. Not for loose tolerances or models where a solve takes a few steps only; and a coefficient ten
    times too large costs accuracy and can make training unsteady: watch both.

    Args:
        kind: ``"error"`` (default), ``"stiffness"`` or ``"both"``.
        reduction: over the steps of a layer: ``"mean"`` (default, official code), ``"sum"`` or ``"max"`` (official code
            for stiffness of ODEs).
        weight: coefficient, a number or a schedule. Default ``exponential_decay(100, 10)``, the paper's for errors on
            MNIST; it has 0.1 for stiffness and 10 for both.

    Raises:
        ValueError: unknown kind or reduction; the model has no such layer.
        RuntimeError: a layer is in ``eval()`` mode while the term is not.

    Examples:
        >>> from regularized.scientific.ode_regularization.layer import NeuralODE
        >>> from regularized.training.step import Batch
        >>> model = NeuralODE(lambda t, u: u.tanh(), rtol=1e-5, atol=1e-5)
        >>> step = Step(model, Batch.of(torch.randn(4, 2).requires_grad_()), Progress(0, 1))
        >>> bool(SolverRegularization()(step) > 0)
        True
    """

    sharding = "forward"

    @allowed(kind=KIND, reduction=REDUCTION)
    def __init__(
        self, *, kind: Kind = "error", reduction: Reduction = "mean", weight: Coefficient | None = None
    ) -> None:
        super().__init__(weight=exponential_decay(100.0, 10.0) if weight is None else weight)
        self.kind: Kind = kind
        self.reduction: Reduction = reduction

    def forward(self, step: Step) -> Tensor:
        """Batch size times the sum of the layers' penalties; 0 in ``eval()`` mode."""
        output = step.output  # the solves
        layers = [module for module in step.model.modules() if isinstance(module, SolverLayer)]
        if not layers:
            raise ValueError(
                f"SolverRegularization found no NeuralODE or NeuralSDE in {type(step.model).__name__}; it needs one"
            )
        if not self.training:
            first = output if isinstance(output, Tensor) else layers[0].statistics.errors
            return first.new_zeros(())
        total = [solver_penalty(layer.statistics, kind=self.kind, reduction=self.reduction) for layer in layers]
        return torch.stack(total).sum() * step.batch.size
