"""What the contract suite checks of dynamic pruning: both modes, and both targets."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regularized.compression.dynamic_pruning.layer import MaskPredictor
from regularized.compression.dynamic_pruning.loss import mask_loss
from regularized.compression.dynamic_pruning.masks import filter_strengths, mass_mask
from regularized.compression.dynamic_pruning.term import DynamicPruning
from regularized.evidence.contract import Classification, NotApplicable, Subject, plain

TASK = Classification(features=36, classes=4)
PREDICTOR = partial(MaskPredictor, pool="max", softmax=False)


def model() -> nn.Sequential:
    """Images of 6 x 6 in rows; no batch normalisation, whose statistics of a part are not those of the whole."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def _terms(**settings: Any) -> Mapping[str, nn.Module]:
    return {**plain(), "masks": DynamicPruning(predictor=PREDICTOR, weight=1.0, **settings)}


def _off() -> Mapping[str, nn.Module]:
    return {**plain(), "masks": DynamicPruning(mass=-1, weight=0.0)}


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What a layer does beside its convolution."""
    predictor = MaskPredictor(4, 6)

    def loss(x: Tensor, out: Tensor) -> Tensor:
        wanted = mass_mask(filter_strengths(out, F.relu), 0.8)
        return mask_loss([predictor(x)], [wanted]) + out.square().mean()

    return loss, (torch.randn(5, 4, 6, 6, requires_grad=True), torch.randn(5, 6, 4, 4, requires_grad=True))


def subjects() -> list[Subject]:
    """Decoupled with targets by mass, and jointly with equally many filters for each image."""
    whole = NotApplicable("the parts are those of the other subject")
    return [
        Subject("decoupled", model, partial(_terms, mass=0.7), plain, TASK.data, off=_off, part=_part),
        Subject("joint", model, partial(_terms, prune_ratio=0.4, mode="joint"), plain, TASK.data, off=_off, part=whole),
    ]
