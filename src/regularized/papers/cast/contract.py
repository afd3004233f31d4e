"""What the contract suite checks of CAST."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regularized.compression.cast import CAST, ScaledLinear, SparseAdamW, semi_structured_mask
from regularized.compression.cast.pattern import Pattern
from regularized.evidence.contract import Classification, NotApplicable, Subject, Terms, plain

_TASK = Classification(features=8, hidden=(12,))
_NO_OFF = NotApplicable("what shrinks the weights is the optimizer; no term has a coefficient that would switch it off")


def _model(pattern: Pattern = (2, 4)) -> nn.Sequential:
    """A network whose weights have the pattern already: only of such a one merging leaves the outputs as they are."""
    model = _TASK.model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(semi_structured_mask(module.weight, pattern))
    return model


def _terms(**settings: Any) -> Terms:
    return {"task": CAST(**settings)}


def _part() -> tuple[ScaledLinear, tuple[Tensor]]:
    return ScaledLinear.of(nn.Linear(8, 4), groups=2), (torch.randn(3, 8, requires_grad=True),)


def subjects() -> list[Subject]:
    """As published, and on another pattern without teacher and scales: what the optimizer alone does."""
    # eps far above the rounding of a gradient: the sign of what is nearly zero would otherwise decide a whole step.
    optimizer = partial(SparseAdamW, lr=1e-3, l1=1e-2, total_steps=9, mask_every=2, eps=1e-3)
    subject = partial(Subject, plain=plain, data=_TASK.data, off=_NO_OFF, optimizer=optimizer)
    alone = partial(_terms, pattern=(1, 4), scale_groups=0, eta=0.0)
    return [
        subject("2:4", _model, _terms, part=_part),
        subject("1:4 without teacher and scales", partial(_model, (1, 4)), alone),
    ]
