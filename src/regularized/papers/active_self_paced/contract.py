"""What the contract suite checks of active self-paced learning."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.curriculum.active_self_paced.loss import self_paced_weights
from regularized.curriculum.active_self_paced.procedure import ActiveSelfPaced
from regularized.evidence.contract import BadInput, ProcedureSubject

_N, _CLASSES = 24, 3


def _features() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_N, 4, dtype=torch.float64, generator=generator)


def _truth() -> Tensor:
    return _features()[:, :_CLASSES].argmax(dim=1)


def _start() -> dict[int, int]:
    truth = _truth()
    return {int(torch.nonzero(truth == c)[0]): c for c in range(_CLASSES)}


def _ridge(labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted ridge regression for each class: a classifier without randomness."""
    x = torch.cat([_features(), torch.ones(_N, 1, dtype=torch.float64)], dim=1)
    penalty = 0.1 * torch.eye(x.shape[1], dtype=torch.float64)
    columns = [
        x @ torch.linalg.solve(x.T @ (w[:, None] * x) + penalty, x.T @ (w * y))
        for y, w in zip(labels.T, weights.T, strict=True)
    ]
    return torch.stack(columns, dim=1)


def _oracle(samples: Sequence[int]) -> list[int]:
    answers: list[int] = _truth()[list(samples)].tolist()
    return answers


def _build(**changes: Any) -> ActiveSelfPaced:
    settings: dict[str, Any] = {"num_classes": _CLASSES, "pace": 0.8, "budget": 2, **changes}
    return ActiveSelfPaced(_N, settings.pop("start", _start()), **settings)


def _train(learner: ActiveSelfPaced, rounds: int) -> None:
    for _ in range(rounds):
        learner.run_round(_ridge, oracle=_oracle)


def _weights(learner: ActiveSelfPaced) -> Mapping[str, Tensor]:
    return {"labels": learner.labels, "weights": learner.weights}


def subjects() -> list[ProcedureSubject]:
    """Rounds over a pool with ridge regression in the classifiers' place; plain is a pace that admits everything."""
    return [ProcedureSubject("rounds", _build, partial(_build, pace=1e6), _train, _weights)]


def _first() -> int:
    return next(iter(_start()))


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    nan = torch.full((_N, _CLASSES), float("nan"))
    return [
        BadInput("no certified sample", lambda: _build(start={0: 0}), ValueError, ("no certified sample", "[1, 2]")),
        BadInput("lambda <= 0", lambda: _build(pace=0.0), ValueError, ("pace must be positive", "0.0")),
        BadInput("C <= 0", lambda: _build(cost=-1.0), ValueError, ("cost must be positive", "-1.0")),
        BadInput("pace step < 0", lambda: _build(pace_step=-0.1), ValueError, ("pace_step", "-0.1")),
        BadInput(
            "budget larger than the pool",
            lambda: _build(budget=1000).ask(torch.zeros(_N, _CLASSES)),
            UserWarning,
            ("budget of 1000", "21"),
        ),
        BadInput(
            "oracle: wrong length", lambda: _build().certify([1, 2], [0]), ValueError, ("1 labels came for 2 samples",)
        ),
        BadInput(
            "oracle: out of range",
            lambda: _build().certify([(_first() + 1) % _N], [7]),
            ValueError,
            ("label 7", "new_classes=True"),
        ),
        BadInput(
            "already certified",
            lambda: _build().certify([_first()], [0]),
            ValueError,
            ("already certified", "correct()"),
        ),
        BadInput(
            "negative loss", lambda: self_paced_weights(torch.tensor([-0.5]), 1.0), ValueError, ("at least 0", "-0.5")
        ),
        BadInput("scores not (n, m)", lambda: _build().assign(torch.zeros(3)), ValueError, ("shape (24, 3)", "(3,)")),
        BadInput("scores NaN", lambda: _build().assign(nan), ValueError, ("72 of 72", "not finite")),
        BadInput(
            "all weights 0",
            lambda: self_paced_weights(torch.tensor([3.0, 5.0]), 1.0),
            UserWarning,
            ("median loss is 3", "raise the pace"),
        ),
    ]
