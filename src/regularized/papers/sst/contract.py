"""What the contract suite checks of SST: in a Euclidean and in a hyperbolic network, through draws and a round."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.pretraining.sst.layer import Gradient, SpectralLinear
from regularized.pretraining.sst.lorentz import LorentzLinear, lorentz_lift
from regularized.pretraining.sst.term import SST
from regularized.training.terms import CrossEntropy

TASK = Classification()


class _Hyperbolic(nn.Module):
    """Two hyperbolic layers, the coordinates of whose points are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = LorentzLinear(TASK.features + 1, 9)
        self.out = LorentzLinear(9, TASK.classes + 1, activation=torch.relu)

    def forward(self, x: Tensor) -> Tensor:
        points: Tensor = self.out(self.hidden(lorentz_lift(x)))
        return points[..., 1:]


def _sst(gradient: Gradient = "enhanced") -> Mapping[str, nn.Module]:
    return {
        "task": CrossEntropy(),
        "sst": SST(rank=2, steps_per_iteration=2, iterations_per_round=3, warmup_steps=1, gradient=gradient),
    }


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    layer = SpectralLinear.of(nn.Linear(7, 5), active=torch.tensor([1, 3]))
    return layer, (torch.randn(6, 7, requires_grad=True),)


def subjects() -> list[Subject]:
    """A draw after every second step, a new decomposition after the sixth: on a GPU that one waits for the device."""
    off = NotApplicable("surgery has no coefficient: with all directions active the steps still are those of factors")
    return [
        Subject("euclidean", TASK.model, _sst, plain, TASK.data, off=off, part=_part),
        Subject("hyperbolic", _Hyperbolic, partial(_sst, "default"), plain, TASK.data, off=off, part=_part),
    ]
