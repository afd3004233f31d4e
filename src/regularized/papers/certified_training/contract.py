"""What the contract suite checks of certified training."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import (
    AnySubject,
    Classification,
    DiagnosticSubject,
    ProcedureSubject,
    Subject,
    plain,
)
from regularized.robustness.certified_training.bounds import IntervalBounds
from regularized.robustness.certified_training.interval import Interval, linf_box
from regularized.robustness.certified_training.loss import robust_cross_entropy
from regularized.robustness.certified_training.penalty import relu_balance, tightness
from regularized.robustness.certified_training.procedure import FastCertifiedTraining
from regularized.robustness.certified_training.schedule import SmoothedRadius
from regularized.robustness.certified_training.term import CertifiedTraining
from regularized.training.data import TensorData

TASK = Classification(hidden=(12, 12))
RADIUS = 0.1


def _growing() -> Mapping[str, nn.Module]:
    """The loss alone: penalties are ratios of means over a batch, which the procedure's subject has."""
    radius = SmoothedRadius(RADIUS, start=1, length=2, batches_per_epoch=3)
    return {"certified": CertifiedTraining(radius=radius, penalty=0.0)}


def _off() -> Mapping[str, nn.Module]:
    return {"task": CertifiedTraining(radius=0.0, penalty=0.0)}


def _loss(before: Tensor, width: Tensor, margins: Tensor) -> Tensor:
    box = Interval.around(before, width)
    penalties = tightness(Interval.around(before.detach(), torch.ones_like(before)), [box]) + relu_balance([box])
    return penalties + robust_cross_entropy(margins, torch.zeros(len(margins), dtype=torch.int64))


def _part() -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    before = torch.randn(8, 5, requires_grad=True)
    return _loss, (before, torch.rand(8, 5, requires_grad=True), torch.randn(8, 4, requires_grad=True))


def _build(*, radius: float = RADIUS, penalty: float = 0.5) -> FastCertifiedTraining:
    model = nn.Sequential(
        *(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()),
        nn.Linear(12, 4),
    )
    adam = partial(torch.optim.Adam, lr=1e-2)
    return FastCertifiedTraining(model, radius=radius, optimizer=adam, start=1, length=1, penalty=penalty)


def _train(training: FastCertifiedTraining, epochs: int) -> None:
    data = TASK.data(24, 0)
    training.fit(TensorData(data["inputs"], data["targets"], batch_size=8, seed=1), epochs=training.epoch + epochs)


def _weights(training: FastCertifiedTraining) -> Mapping[str, Tensor]:
    return training.model.state_dict()


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    inputs = TASK.data(16, 0)["inputs"].to(next(model.parameters()).device)
    bounds = IntervalBounds(model)
    with torch.no_grad():
        found = bounds(linf_box(inputs, RADIUS)).output
    bounds.remove()
    return {"lower": found.lower, "upper": found.upper}


def subjects() -> list[AnySubject]:
    """The term without penalties, the whole method as a procedure, and the bounds themselves."""
    return [
        Subject("term", TASK.model, _growing, plain, TASK.data, _off, _part),
        ProcedureSubject("whole method", _build, partial(_build, radius=1e-9, penalty=0.0), _train, _weights),
        DiagnosticSubject("bounds", TASK.model, _report),
    ]
