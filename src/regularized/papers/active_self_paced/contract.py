"""What the contract suite checks of active self-paced learning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.evidence.contract import ProcedureSubject

SAMPLES, _CLASSES = 24, 3


def _features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, 4, dtype=torch.float64, generator=generator)


def _truth() -> Tensor:
    return _features()[:, :_CLASSES].argmax(dim=1)


def first_of_each_class() -> dict[int, int]:
    """The first sample of each class, certified."""
    truth = _truth()
    return {int(torch.nonzero(truth == c)[0]): c for c in range(_CLASSES)}


def _ridge(labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted ridge regression for each class: a classifier without randomness."""
    x = torch.cat([_features(), torch.ones(SAMPLES, 1, dtype=torch.float64)], dim=1)
    penalty = 0.1 * torch.eye(x.shape[1], dtype=torch.float64)
    columns = [
        x @ torch.linalg.solve(x.T @ (w[:, None] * x) + penalty, x.T @ (w * y))
        for y, w in zip(labels.T, weights.T, strict=True)
    ]
    return torch.stack(columns, dim=1)


def _oracle(samples: Sequence[int]) -> list[int]:
    answers: list[int] = _truth()[list(samples)].tolist()
    return answers


def learner(**changes: Any) -> ActiveSelfPaced:
    """The procedure on a pool of 24 samples, with other settings where given."""
    settings: dict[str, Any] = {"num_classes": _CLASSES, "pace": 0.8, "budget": 2, **changes}
    return ActiveSelfPaced(SAMPLES, settings.pop("start", first_of_each_class()), **settings)


def _train(learner: ActiveSelfPaced, rounds: int) -> None:
    for _ in range(rounds):
        learner.run_round(_ridge, oracle=_oracle)


def _weights(learner: ActiveSelfPaced) -> Mapping[str, Tensor]:
    return {"labels": learner.labels, "weights": learner.weights}


def subjects() -> list[ProcedureSubject]:
    """Rounds over a pool with ridge regression in the classifiers' place; plain is a pace that admits everything."""
    return [ProcedureSubject("rounds", learner, partial(learner, pace=1e6), _train, _weights)]
