"""What the contract suite checks of SVFit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.fine_tuning.svfit.layer import SVFitLayer
from regularized.fine_tuning.svfit.product import shifted_weight
from regularized.fine_tuning.svfit.term import SVFit
from regularized.training.terms import CrossEntropy

TASK = Classification()


def _full() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "svfit": SVFit()}


def _few() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "svfit": SVFit(rank=2, target_modules=["0"], also_train=["2"], decay="sigma")}


def _part() -> tuple[object, tuple[Tensor, ...]]:
    left, right = torch.linalg.qr(torch.randn(5, 3))[0], torch.linalg.qr(torch.randn(7, 3))[0].T.contiguous()
    return shifted_weight, (torch.randn(5, 7), left, torch.randn(3, requires_grad=True), right)


def _layer_part() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SVFitLayer.of(nn.Linear(7, 5)), (torch.randn(50, 7, requires_grad=True),)


def subjects() -> list[Subject]:
    """All directions of every layer; and a few of one, in the paper's form, beside a head that is trained whole."""
    no_off = NotApplicable("surgery has no coefficient: without it the weights themselves are trained")
    return [
        Subject("full", TASK.model, _full, plain, TASK.data, off=no_off, part=_part),  # type: ignore[arg-type]
        Subject("rank 2, sigma, head", TASK.model, _few, plain, TASK.data, off=no_off, part=_layer_part),
    ]
