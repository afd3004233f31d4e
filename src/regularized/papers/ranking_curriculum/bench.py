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
from regularized.evidence.models import mlp, resnet18, seeded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _small() -> nn.Module:
    return mlp([128, 64, 1])


def _large() -> nn.Module:
    return resnet18(1, width=16)


def _build(make: type[nn.Module] | object, shape: tuple[int, ...]) -> tuple[StepFunction, StepFunction]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * shape[0], *shape[1:], generator=generator).to(DEVICE)
    easy = torch.rand(2, shape[0], generator=generator).to(DEVICE)
    criterion = DifficultyWeightedLoss(pairwise_softmax_loss, RankingCurriculum(20))
    criterion.curriculum.set_epoch(3)

    def plain(positive: Tensor, negative: Tensor) -> Tensor:
        return pairwise_softmax_loss(positive, negative).mean()

    difficulty = pairwise_difficulty(easy[0], easy[1])  # once, before training

    def weighted(positive: Tensor, negative: Tensor) -> Tensor:
        value: Tensor = criterion(positive, negative, difficulty)
        return value

    def steps(loss_of: Callable[[Tensor, Tensor], Tensor]) -> StepFunction:
        model = seeded(0, make).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

        def step() -> None:
            positive, negative = model(inputs).squeeze(1).chunk(2)
            loss_of(positive, negative).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

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
