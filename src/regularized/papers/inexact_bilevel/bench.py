"""Cost of adaptive accuracies beside descent with the same accuracy; one graph for all products beside one for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.evidence.bench import StepFunction, Workload
from regularized.evidence.bench_kit import device
from regularized.scientific.inexact_bilevel.baselines import FixedAccuracy
from regularized.scientific.inexact_bilevel.bound import BilevelConstants
from regularized.scientific.inexact_bilevel.denoising import SquaredError, TotalVariation
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.lower_solvers import solve_lower
from regularized.scientific.inexact_bilevel.maid import MAID

_EPS = 1e-3


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device())


def _ridge(samples: int, features: int) -> dict[str, Any]:
    """Softmax regression with one ridge weight for each parameter."""
    X, V = (_drawn(samples, features) / features**0.5 for _ in range(2))
    truth = _drawn(features, 10)
    y, v = ((part @ truth + _drawn(samples, 10)).argmax(dim=1) for part in (X, V))
    curvature = 0.5 * float(torch.linalg.matrix_norm(X, 2)) ** 2 / samples
    return {
        "lower": lambda w, theta: F.cross_entropy(X @ w, y) + 0.5 * (theta.exp() * w.square()).sum(),
        "upper": lambda w: F.cross_entropy(V @ w, v),
        "theta": torch.full_like(truth, -3.0),
        "x": torch.zeros_like(truth),
        "mu": lambda theta: theta.exp().min(),
        "L": lambda theta: curvature + theta.exp().max(),
    }


def _denoising(images: int, size: int) -> dict[str, Any]:
    clean = torch.rand(images, 1, size // 8, size // 8, dtype=torch.float64).to(device())
    clean = F.interpolate(clean, size=(size, size), mode="bilinear").squeeze(1)
    lower = TotalVariation(clean + 0.1 * torch.randn_like(clean))
    return {
        **{"lower": lower, "upper": SquaredError(clean), "theta": lower.start() + 2.0, "x": lower.noisy},
        **{"mu": lower.mu, "L": lower.L},
    }


def _steps(
    problem: Callable[..., dict[str, Any]], eps: float, first: float, *sizes: int
) -> tuple[StepFunction, StepFunction]:
    """Both start each step at the same warm state, with the same accuracy, and accept their first trial step."""
    about = problem(*sizes)
    plain = FixedAccuracy(**about, eps=eps, step=first)
    method = MAID(**about, eps=eps, delta=eps, step=first, nu=1.0, constants=BilevelConstants(upper=1.0))
    states = []
    for opt in (plain, method):
        opt.run(2)
        states.append(opt.state_dict())
        info = opt.step()
        if (info.status, info.eps) != ("descended", eps):
            raise RuntimeError(f"not the same work: {info}; take a smaller eps or a larger step")

    def plain_step() -> None:
        plain.load_state_dict(states[0]).step()

    def method_step() -> None:
        method.load_state_dict(states[1]).step()

    return plain_step, method_step


def _hypergradients(problem: Callable[..., dict[str, Any]], *sizes: int) -> tuple[StepFunction, StepFunction]:
    about = problem(*sizes)
    lower, upper, theta = about["lower"], about["upper"], about["theta"]
    mu, L = (float(c(theta) if callable(c) else c) for c in (about["mu"], about["L"]))
    x = solve_lower(lower, about["x"], theta, mu=mu, L=L, eps=_EPS).x
    ours = partial(hypergradient, lower, upper, x, theta, cg_tol=_EPS)

    def official() -> None:
        rebuilt(lower, upper, x, theta, _EPS)

    return official, lambda: (ours(), None)[1]


def rebuilt(lower: Any, upper: Any, x: Tensor, theta: Tensor, tol: float) -> Tensor:
    """What the official code does: the gradient's graph is built anew for each product."""
    x, theta = x.detach().requires_grad_(), theta.detach().requires_grad_()

    def graph() -> Tensor:
        return torch.autograd.grad(lower(x, theta), x, create_graph=True)[0]

    (b,) = torch.autograd.grad(upper(x), x)
    q, r = torch.zeros_like(b), b
    p, squared = r, r.square().sum()
    while float(squared) ** 0.5 > tol:
        (product,) = torch.autograd.grad(graph(), x, p)
        step = squared / (p * product).sum()
        q, r = q + step * p, r - step * product
        previous, squared = squared, r.square().sum()
        p = r + squared / previous * p
    (transposed,) = torch.autograd.grad((graph() * q).sum(), theta)
    return -transposed


def workloads() -> list[Workload]:
    """Outer steps at two sizes of each problem, and the hypergradient alone."""
    return [
        Workload(
            "ridge, 300 x 64", partial(_steps, _ridge, 1e-6, 10.0, 300, 64), "outer step, fixed -> adaptive accuracy"
        ),
        Workload(
            "ridge, 5000 x 144",
            partial(_steps, _ridge, 1e-6, 10.0, 5000, 144),
            "outer step, fixed -> adaptive accuracy",
        ),
        Workload(
            "TV, 8 x 64 x 64", partial(_steps, _denoising, 1e-4, 1e-2, 8, 64), "outer step, fixed -> adaptive accuracy"
        ),
        Workload(
            "hypergradient, ridge 5000 x 144",
            partial(_hypergradients, _ridge, 5000, 144),
            "the graph built for each product -> once",
            floor=0.5,
        ),
        Workload(
            "hypergradient, TV 8 x 96 x 96",
            partial(_hypergradients, _denoising, 8, 96),
            "the graph built for each product -> once",
            floor=0.5,
        ),
    ]
