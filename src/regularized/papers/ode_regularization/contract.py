"""What the contract suite checks of solver regularisation.

The subjects take a given number of steps and one error a row, so that a batch is the sum of its parts and nothing waits
for the device. Adaptive steps are shared by a batch: there, results depend on the batch by design.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.scientific.ode_regularization.layer import NeuralODE
from regularized.scientific.ode_regularization.term import SolverRegularization, exponential_decay

FEATURES, CLASSES = 4, 3
TASK = Classification(FEATURES, CLASSES, random_labels=True)


class _Field(nn.Module):
    """A small network of the state, growing with time."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(u)) * (2.0 + t)


def _model() -> nn.Module:
    layer = NeuralODE(_Field(), steps=2, norm="sample", rtol=1e-2, atol=1e-2)
    return nn.Sequential(layer, nn.Linear(FEATURES, CLASSES))


def _errors() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(weight=exponential_decay(0.5, 0.2))}


def _both() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(kind="both", reduction="sum", weight=0.1)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "solver": SolverRegularization(weight=0.0)}


def subjects() -> list[Subject]:
    """Error regularisation with annealing, and errors with stiffness."""
    no_part = NotApplicable("an adaptive solver decides on the host which step comes next")
    return [
        Subject("error", model=_model, terms=_errors, off=_off, plain=plain, data=TASK.data, part=no_part),
        Subject("both", model=_model, terms=_both, off=_off, plain=plain, data=TASK.data, part=no_part),
    ]
