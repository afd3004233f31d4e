"""What the contract suite checks of BackSlash and of the report on weights."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.compression.generalized_gaussian import BackSlash, DecoupledBackSlash, layer_shapes, rate
from regularized.evidence.contract import Classification, DiagnosticSubject, NotApplicable, Subject, plain
from regularized.evidence.contract.subjects import AnySubject
from regularized.training.terms import CrossEntropy

TASK = Classification()


def _in_loss(weight: float = 0.5, shape: float | None = None) -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "rate": BackSlash(weight=weight, shape=shape)}


def _decoupled(strength: float = 0.1) -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "rate": DecoupledBackSlash(strength=strength)}


class _Rate(nn.Module):
    """The rate as a part of its own, of two weights."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return rate([first, second], eps=0.1)


def _part() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _Rate(), (torch.randn(5, 7, requires_grad=True), torch.randn(3, requires_grad=True))


def _report(model: nn.Module) -> Mapping[str, Tensor]:
    return {name: torch.tensor([law.shape, law.scale]) for name, law in layer_shapes(model).items()}


def subjects() -> list[AnySubject]:
    """In the loss, with the shape of the weights and with a fixed one; after the step; and the shapes of layers."""
    no_part = NotApplicable("what runs in the step has no graph; the rate is compiled with the term in the loss")
    return [
        Subject("in_loss", TASK.model, _in_loss, plain, TASK.data, off=partial(_in_loss, 0.0), part=_part),
        Subject(
            "fixed_shape", TASK.model, partial(_in_loss, 0.5, 1.0), plain, TASK.data, off=partial(_in_loss, 0.0, 1.0)
        ),
        Subject("decoupled", TASK.model, _decoupled, plain, TASK.data, off=partial(_decoupled, 0.0), part=no_part),
        DiagnosticSubject("layer_shapes", TASK.model, _report),
    ]
