"""What the contract suite checks of the ranking curriculum: the term on pairs and on documents."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.loss import DifficultyWeightedLoss, RankingCurriculum
from regularized.curriculum.ranking_curriculum.reranker_losses import (
    pairwise_softmax_loss,
)
from regularized.curriculum.ranking_curriculum.term import DifficultyWeighted
from regularized.evidence.contract import NotApplicable, Subject
from regularized.evidence.models import mlp
from regularized.training.terms import Loss

SAMPLES, FEATURES = 24, 5


def scorer() -> nn.Module:
    """One score for a document."""
    return mlp([FEATURES, 8, 1])


def difficulties() -> Tensor:
    """Of each sample, in [0, 1]."""
    return torch.rand(SAMPLES, generator=torch.Generator().manual_seed(4))


def _pair_loss(scores: Tensor, targets: Tensor) -> Tensor:
    return pairwise_softmax_loss(scores[:, 0, 0], scores[:, 1:, 0])


def _plain_pairs() -> Mapping[str, nn.Module]:
    return {"task": Loss(_pair_loss)}


def _pairs() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_pair_loss, difficulties(), end_epoch=2)}


def _pairs_off() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(_pair_loss, difficulties(), end_epoch=0)}


def _pair_data(n: int, seed: int) -> Mapping[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # A relevant document and two others of a query; the task is to score the first highest.
    return {
        "inputs": torch.randn(n, 3, FEATURES, generator=generator),
        "targets": torch.zeros(n, dtype=torch.int64),
        "index": torch.arange(n),
    }


def point_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each score."""
    return (scores.squeeze(-1) - labels).square()


def _plain_points() -> Mapping[str, nn.Module]:
    return {"task": Loss(point_loss)}


def _points() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(point_loss, difficulties())}


def _points_off() -> Mapping[str, nn.Module]:
    return {"task": DifficultyWeighted(point_loss, difficulties(), end_epoch=0)}


def point_data(n: int, seed: int) -> Mapping[str, Tensor]:
    """Documents with a label each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randn(n, FEATURES, generator=generator),
        "targets": torch.randint(2, (n,), generator=generator).float(),
        "index": torch.arange(n),
    }


def _part() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(8, 3, generator=generator).requires_grad_()
    criterion = DifficultyWeightedLoss(pairwise_softmax_loss, RankingCurriculum(10))
    criterion.curriculum.set_epoch(3)

    def part(scores: Tensor, difficulty: Tensor) -> Tensor:
        value: Tensor = criterion(scores[:, 0], scores[:, 1:], difficulty)
        return value

    return part, (scores, difficulties()[:8])


def subjects() -> list[Subject]:
    """The term on pairs, with several negatives, and on single documents."""
    same_part = NotApplicable("the part is that of pairs")
    return [
        Subject("pairwise", scorer, _pairs, _plain_pairs, _pair_data, off=_pairs_off, part=_part),
        Subject("pointwise", scorer, _points, _plain_points, point_data, off=_points_off, part=same_part),
    ]
