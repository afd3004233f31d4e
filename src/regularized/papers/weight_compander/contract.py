"""What the contract suite checks of Weight Compander."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.overfitting.weight_compander import Compander, WeightCompander
from regularized.training.terms import CrossEntropy

TASK = Classification()


def _fixed() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "compander": WeightCompander()}


def _learned() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "compander": WeightCompander(learnable=True, shape_lr=1e-3)}


def _part(learnable: bool = True) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Compander(1.0, 0.5, learnable=learnable), (torch.randn(5, 7, requires_grad=True),)


def subjects() -> list[Subject]:
    """Fixed and learned a and b."""
    no_off = NotApplicable("a reparametrisation has no coefficient")
    return [
        Subject("fixed", TASK.model, _fixed, plain, TASK.data, off=no_off, part=partial(_part, False)),
        Subject("learned", TASK.model, _learned, plain, TASK.data, off=no_off, part=_part),
    ]
