"""What the contract suite checks of SLTrain."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from regularized.evidence.contract import Classification, NotApplicable, Subject, plain
from regularized.pretraining.sltrain.layer import SparseLowRankLinear
from regularized.pretraining.sltrain.term import SLTrain
from regularized.training.terms import CrossEntropy

TASK = Classification(hidden=(12, 12))


def _both() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "sltrain": SLTrain(rank=2, density=0.1, alpha=4, include=["2"])}


def _entries() -> Mapping[str, nn.Module]:
    return {"task": CrossEntropy(), "sltrain": SLTrain(rank=0, density=0.3, include=[""])}


def _part() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = SparseLowRankLinear(40, 30, rank=4, density=0.1, trained_scale=True)
    return layer, (torch.randn(50, 40, requires_grad=True),)


def _sparse_part() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return SparseLowRankLinear(40, 30, rank=0, density=0.1), (torch.randn(50, 40, requires_grad=True),)


def subjects() -> list[Subject]:
    """Factors and entries in the middle of a network; entries alone in all of it."""
    no_off = NotApplicable("surgery has no coefficient: without it the weights themselves are trained")
    return [
        Subject("rank 2, density 0.1", TASK.model, _both, plain, TASK.data, off=no_off, part=_part),
        Subject("entries alone", TASK.model, _entries, plain, TASK.data, off=no_off, part=_sparse_part),
    ]
