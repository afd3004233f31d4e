"""What the contract suite checks of bilevel methods: the method and its baselines."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract import ProcedureSubject
from regularized.scientific.inexact_bilevel.baselines import HOAG, FixedAccuracy
from regularized.scientific.inexact_bilevel.denoising import FieldsOfExperts, SquaredError
from regularized.scientific.inexact_bilevel.descent import BilevelDescent
from regularized.scientific.inexact_bilevel.maid import MAID


def ridge(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Linear regression with one ridge weight for each of four parameters."""
    draws = torch.Generator().manual_seed(0)
    X, V = (torch.randn(12, 4, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2))
    y, v = (torch.randn(12, generator=draws, dtype=torch.float64).to(dtype) for _ in range(2))
    curvature = float(torch.linalg.matrix_norm(X, 2)) ** 2
    return {
        "lower": lambda w, theta: 0.5 * (X @ w - y).square().sum() + 0.5 * (theta.exp() * w.square()).sum(),
        "upper": lambda w: 0.5 * (V @ w - v).square().mean(),
        "theta": torch.zeros(4, dtype=dtype),
        "x": torch.zeros(4, dtype=dtype),
        "mu": lambda theta: theta.exp().min(),
        "L": lambda theta: curvature + theta.exp().max(),
    }


def _denoiser(method: Any) -> BilevelDescent:
    draws = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 6, 6, generator=draws, dtype=torch.float64).round()
    lower = FieldsOfExperts(clean + 0.1 * torch.randn(2, 6, 6, generator=draws, dtype=torch.float64))
    theta = lower.start(filters=2, size=3, generator=draws)
    opt: BilevelDescent = method(
        lower, SquaredError(clean), theta, lower.noisy, mu=lower.mu, L=lower.L, eps=0.1, step=0.1
    )
    return opt


def descent(method: Any, **options: Any) -> BilevelDescent:
    """A method on the ridge problem."""
    opt: BilevelDescent = method(**ridge(), **options)
    return opt


def _train(opt: BilevelDescent, epochs: int) -> None:
    opt.run(2 * epochs)


def _weights(opt: BilevelDescent) -> Mapping[str, Tensor]:
    theta = opt.theta if isinstance(opt.theta, dict) else {"theta": opt.theta}
    return {**theta, "x": opt.x}


def subjects() -> list[ProcedureSubject]:
    """The method on ridge weights and on filters, and what it is compared with; plain is one loose accuracy for all."""
    loose = partial(descent, FixedAccuracy, eps=0.1, step=1.0)
    return [
        ProcedureSubject("adaptive accuracies", partial(descent, MAID, step=1.0), loose, _train, _weights),
        ProcedureSubject(
            "adaptive accuracies, filters",
            partial(_denoiser, MAID),
            partial(_denoiser, FixedAccuracy),
            _train,
            _weights,
        ),
        ProcedureSubject("HOAG", partial(descent, HOAG, schedule="quadratic"), loose, _train, _weights),
        ProcedureSubject(
            "fixed accuracy", partial(descent, FixedAccuracy, eps=1e-6, step=1.0), loose, _train, _weights
        ),
    ]
