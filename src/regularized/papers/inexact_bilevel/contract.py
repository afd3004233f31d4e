"""What the contract suite checks of bilevel methods: the method, its baselines, and every bad input."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regularized.evidence.contract import BadInput, ProcedureSubject
from regularized.mechanisms.conjugate_gradient import NotPositiveDefinite
from regularized.scientific.inexact_bilevel.baselines import HOAG, FixedAccuracy
from regularized.scientific.inexact_bilevel.bound import BilevelConstants
from regularized.scientific.inexact_bilevel.denoising import FieldsOfExperts, SquaredError, TotalVariation
from regularized.scientific.inexact_bilevel.descent import BilevelDescent
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.lower_solvers import InnerToleranceNotReached, solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID


def _ridge(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
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


def _build(method: Any, **options: Any) -> BilevelDescent:
    opt: BilevelDescent = method(**_ridge(), **options)
    return opt


def _train(opt: BilevelDescent, epochs: int) -> None:
    opt.run(2 * epochs)


def _weights(opt: BilevelDescent) -> Mapping[str, Tensor]:
    theta = opt.theta if isinstance(opt.theta, dict) else {"theta": opt.theta}
    return {**theta, "x": opt.x}


def subjects() -> list[ProcedureSubject]:
    """The method on ridge weights and on filters, and what it is compared with; plain is one loose accuracy for all."""
    loose = partial(_build, FixedAccuracy, eps=0.1, step=1.0)
    return [
        ProcedureSubject("adaptive accuracies", partial(_build, MAID, step=1.0), loose, _train, _weights),
        ProcedureSubject(
            "adaptive accuracies, filters",
            partial(_denoiser, MAID),
            partial(_denoiser, FixedAccuracy),
            _train,
            _weights,
        ),
        ProcedureSubject("HOAG", partial(_build, HOAG, schedule="quadratic"), loose, _train, _weights),
        ProcedureSubject("fixed accuracy", partial(_build, FixedAccuracy, eps=1e-6, step=1.0), loose, _train, _weights),
    ]


def _maid(**changes: Any) -> MAID:
    return MAID(**{**_ridge(), **changes})


def _step(**changes: Any) -> Any:
    return _maid(**changes).step()


def _concave(x: Tensor, theta: Tensor) -> Tensor:
    return -0.5 * x.square().sum() + (x * theta).sum()


def _elsewhere(held: Tensor) -> Any:
    return _step(theta=held, upper=lambda w: (w * held).sum())


def _batches(x: Tensor, theta: Tensor) -> Tensor:
    return (torch.rand(4, dtype=x.dtype) * (x - theta - 1.0).square()).sum()


def bad_inputs() -> list[BadInput]:
    """Every line of the sheet's "bad input"."""
    one = torch.ones(4)
    return [
        BadInput(
            "lower not strongly convex",
            lambda: hypergradient(_concave, torch.sum, one, one),
            NotPositiveDefinite,
            ("p^T A p = -", "add ridge"),
        ),
        BadInput("mu missing", lambda: _maid(mu=None), ValueError, ("mu is missing", "least curvature")),
        BadInput("L missing", lambda: _maid(L=None), ValueError, ("L is missing", "largest curvature")),
        BadInput("mu <= 0", lambda: _maid(mu=0.0), ValueError, ("mu must be > 0, got 0.0", "ridge")),
        BadInput("L < mu", lambda: _maid(mu=2.0, L=1.0), ValueError, ("L must be", ">= mu = 2.0")),
        BadInput(
            "theta disconnected",
            lambda: _step(lower=lambda w, theta: 0.5 * (w - 1.0).square().sum() + theta.sum()),
            ValueError,
            ("does not depend on theta through the lower problem",),
        ),
        BadInput(
            "zero B",
            lambda: _step(lower=lambda w, theta: 0.5 * (w - 1.0).square().sum() + 0.0 * (w * theta).sum()),
            ValueError,
            ("does not depend on theta through the lower problem",),
        ),
        BadInput(
            "x disconnected",
            lambda: _step(upper=lambda w: torch.ones(())),
            ValueError,
            ("upper(x) does not depend on x",),
        ),
        BadInput(
            "theta cannot be differentiated",
            lambda: _maid(theta=torch.zeros(4, dtype=torch.long)),
            ValueError,
            ("theta must be floating point", "float64"),
        ),
        BadInput(
            "upper uses theta past its arguments",
            lambda: _elsewhere(torch.zeros(4, dtype=torch.float64, requires_grad=True)),
            ValueError,
            ("write it as upper(x, theta)",),
        ),
        BadInput(
            "inner tolerance not reached",
            lambda: _step(max_inner=2),
            InnerToleranceNotReached,
            ("after 2 iterations", "mu eps", "max_inner"),
        ),
        BadInput(
            "eps too small for float32",
            lambda: solve_lower(**_float32(), eps=1e-9, max_iterations=200),
            InnerToleranceNotReached,
            ("use float64",),
        ),
        BadInput(
            "mini-batches", lambda: _maid(lower=_batches), ValueError, ("the same arguments", "deterministic=False")
        ),
        BadInput("eps <= 0", lambda: _maid(eps=0.0), ValueError, ("eps", "> 0")),
        BadInput("eta outside (0, 1)", lambda: _maid(eta=1.0), ValueError, ("eta", "between 0 and 1")),
        BadInput("nu < 1", lambda: _maid(nu=0.9), ValueError, ("nu and growth", "0.9")),
        BadInput("unknown bound", lambda: _maid(bound="exact"), ValueError, ('"rigorous"', "'exact'")),
        BadInput(
            "rigorous bound without its constants",
            lambda: _maid(bound="rigorous", constants=BilevelConstants(upper=1.0)),
            ValueError,
            ("cross_lipschitz", "heuristic"),
        ),
        BadInput("unknown schedule", lambda: _build(HOAG, schedule="linear"), ValueError, ('"cubic"', "'linear'")),
        BadInput("no end", lambda: _maid().run(), ValueError, ("steps, budget or both",)),
        BadInput(
            "state of another problem",
            lambda: _maid().load_state_dict({**_maid().state_dict(), "theta": torch.zeros(3)}),
            ValueError,
            ("theta has 3 entries", "4"),
        ),
        BadInput("colour images", lambda: TotalVariation(torch.rand(2, 3, 8, 8)), ValueError, ("(N, H, W)", "3, 8, 8")),
        BadInput(
            "filters larger than the images",
            lambda: FieldsOfExperts(torch.rand(2, 4, 4)).start(),
            ValueError,
            ("size 7", "(4, 4)"),
        ),
    ]


def _float32() -> dict[str, Any]:
    problem = _ridge(torch.float32)
    del problem["upper"]
    theta = problem["theta"]
    return {**problem, "mu": float(problem["mu"](theta)), "L": float(problem["L"](theta))}
