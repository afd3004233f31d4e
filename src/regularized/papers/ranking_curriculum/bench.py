"""Overhead of the curriculum over a plain step of the same ranker on the same pairs."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from regularized.curriculum.ranking_curriculum.loss import (
    DifficultyWeightedLoss,
    RankingCurriculum,
    pairwise_difficulty,
)
from regularized.curriculum.ranking_curriculum.reranker_losses import pairwise_softmax_loss
from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device, placed, stepper
from regularized.evidence.models import mlp, resnet18


def _small() -> nn.Module:
    return mlp([128, 64, 1])


def _large() -> nn.Module:
    return resnet18(1, width=16)


def _build(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * shape[0], *shape[1:], generator=generator).to(device())
    easy = torch.rand(2, shape[0], generator=generator).to(device())
    criterion = DifficultyWeightedLoss(pairwise_softmax_loss, RankingCurriculum(20))
    criterion.curriculum.set_epoch(3)

    def plain(positive: Tensor, negative: Tensor) -> Tensor:
        return pairwise_softmax_loss(positive, negative).mean()

    difficulty = pairwise_difficulty(easy[0], easy[1])  # once, before training

    def weighted(positive: Tensor, negative: Tensor) -> Tensor:
        value: Tensor = criterion(positive, negative, difficulty)
        return value

    def steps(loss_of: Callable[[Tensor, Tensor], Tensor]) -> StepFunction:
        model = placed(make)

        def loss() -> Tensor:
            positive, negative = model(inputs).squeeze(1).chunk(2)
            return loss_of(positive, negative)

        return stepper(loss, torch.optim.Adam(model.parameters(), lr=1e-3))

    return steps(plain), steps(weighted)


def workloads() -> list[Workload]:
    """The experiment's own tiny ranker, the worst case, and a ranker of images."""
    return [
        Workload(
            "MLP 128-64-1, 16 pairs",
            partial(_build, _small, (16, 128)),
            note="a step of a third of a millisecond, far below any real ranker: the worst case",
        ),
        Workload("resnet18 w16, 16 pairs of 32 x 32", partial(_build, _large, (16, 3, 32, 32))),
        Workload("resnet18 w16, 64 pairs of 32 x 32", partial(_build, _large, (64, 3, 32, 32))),
    ]
