"""What the contract suite checks of SORSA: the adapter in the loop, and its penalty alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.fine_tuning.sorsa.layer import SorsaLinear, inject_sorsa
from regularized.fine_tuning.sorsa.penalty import orthonormal_penalty
from regularized.fine_tuning.sorsa.term import Sorsa

FEATURES, LR = 6, 0.1
TASK = Classification(FEATURES, hidden=(8,))
_SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)


def adapted() -> nn.Module:
    """The network with SORSA layers."""
    model = TASK.model()
    inject_sorsa(model, r=3)
    return model


def _adapter() -> Mapping[str, nn.Module]:
    return {**plain(), "sorsa": Sorsa(r=3, lr=LR, gamma=0.01)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "sorsa": Sorsa(r=3, lr=LR, gamma=0.0)}


def _layer_part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return SorsaLinear.of(nn.Linear(7, 5), r=3), (torch.randn(4, 7, requires_grad=True),)


def _penalty_part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def penalty(*factors: Tensor) -> Tensor:
        return orthonormal_penalty(factors)

    return penalty, tuple(torch.randn(3, n, requires_grad=True) for n in (5, 7, 5))


def subjects() -> list[Subject]:
    """Injection by the term, and the penalty on a model that was injected before."""
    no_off = NotApplicable("without the penalty the adapter still is one: that is the other subject")
    return [
        Subject("adapter", TASK.model, _adapter, plain, TASK.data, no_off, _layer_part, _SGD),
        Subject("penalty", adapted, _adapter, plain, TASK.data, off=_off, part=_penalty_part, optimizer=_SGD),
    ]
