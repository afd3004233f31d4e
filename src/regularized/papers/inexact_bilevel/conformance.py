"""Golden vectors of the official class on small quadratics: hypergradient, optimum, and its whole trace."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.scientific.inexact_bilevel.hypergradient import hypergradient
from regularized.scientific.inexact_bilevel.lower_solvers import gradient_descent, solve_lower
from regularized.scientific.inexact_bilevel.official import OfficialMAID

# What does not depend on the implementation is exact; the trace of the official heuristic is that of float32 parts.
_EXACT = {"x_star_theta0": 1e-8, "hyper_exact": 1e-8, "theta_opt": 1e-8, "f_opt": 1e-8}
_SOLVED = {"hyper_x": 1e-5, "hyper_q": 1e-5, "hyper_z": 1e-5, "hyper_true_error": 1e-5}
TOLERANCE = 1e-3


def tolerance(case: Case, output: str) -> float:
    """By what the output is."""
    return {**_EXACT, **_SOLVED}.get(output, TOLERANCE)


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """g = 1/2 ||A1 x - b1||², h = 1/2 ||A2 x + A3 theta - b2||²; a trace where the case has its settings."""
    if not case.has("in/A1", "in/A2", "in/A3", "in/b1", "in/b2", "in/theta0"):
        raise UnknownCase(case)
    A1, A2, A3, b1, b2, theta0 = (_tensor(case, name) for name in ("A1", "A2", "A3", "b1", "b2", "theta0"))

    def lower(x: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * (A2 @ x + A3 @ theta - b2).square().sum()

    def upper(x: Tensor) -> Tensor:
        return 0.5 * (A1 @ x - b1).square().sum()

    curvatures = torch.linalg.eigvalsh(A2.T @ A2)
    constants: dict[str, Any] = {
        "mu": case.number("mu", float(curvatures[0])),
        "L": case.number("L", float(curvatures[-1])),
    }

    def exact(theta: Tensor) -> tuple[Tensor, Tensor, float]:
        """x*, grad f and f at theta."""
        start = torch.linalg.lstsq(A2, b2 - A3 @ theta).solution
        # A distance of 1e-11 of the size of x leaves room for the rounding of float64.
        eps = 1e-11 * (1.0 + float(start.norm()))
        x = solve_lower(lower, start, theta, **constants, eps=eps, max_iterations=100_000).x
        found = hypergradient(lower, upper, x, theta, cg_tol=1e-12 * (1.0 + float((A1.T @ b1).norm())))
        return x, found.gradient, found.loss

    x_star, gradient, _ = exact(theta0)
    out: dict[str, Any] = {"x_star_theta0": x_star, "hyper_exact": gradient}
    if {"theta_opt", "f_opt"} & set(case.outputs):
        # f is quadratic: its Hessian column by column, and steps of Newton, all but the first against rounding.
        columns = [exact(theta0 + step)[1] - gradient for step in torch.eye(len(theta0), dtype=torch.float64)]
        theta = theta0
        for _ in range(3):
            theta = theta - torch.linalg.lstsq(torch.stack(columns, dim=1), exact(theta)[1]).solution
        out |= {"theta_opt": theta, "f_opt": np.float64(exact(theta)[2])}
    if case.has("in/x0", "hp/epsilon0", "hp/delta0"):
        x0 = _tensor(case, "x0")
        eps, delta = case.number("epsilon0"), case.number("delta0")
        x = solve_lower(lower, x0, theta0, **constants, eps=eps, max_iterations=1_000_000, solver=gradient_descent).x
        found = hypergradient(lower, upper, x, theta0, cg_tol=delta)
        out |= {"hyper_x": x, "hyper_q": found.q, "hyper_z": found.gradient}
        out["hyper_true_error"] = (found.gradient - gradient).norm()
        if case.has("hp/iters", "hp/beta0", "hp/Lg"):
            out |= _trace(case, lower, upper, theta0, x0, constants)
    return {name: np.asarray(value) for name, value in out.items()}


def _trace(
    case: Case, lower: Any, upper: Any, theta0: Tensor, x0: Tensor, constants: Mapping[str, Any]
) -> dict[str, Any]:
    opt = OfficialMAID(
        lower,
        upper,
        theta0,
        x0,
        **constants,
        Lg=case.number("Lg"),
        eps=case.number("epsilon0"),
        delta=case.number("delta0"),
        step=case.number("beta0"),
        eta=case.number("eta", 1e-4),
        rho=case.number("rho", 0.9),
        tau=case.number("tau", 0.5),
        nu=case.number("nu", 1.05),
        perturbations=iter(_tensor(case, "perturbations")) if case.has("in/perturbations") else None,
        lower_solver=gradient_descent,
    )
    opt.run(int(case.number("iters")))
    trace = opt.trace
    return {
        "loss": trace.loss,
        "step_size": trace.step_size,
        "eps_trace": trace.eps,
        "delta_trace": trace.delta,
        "ll_calls": trace.ll_calls,
        "cg_calls": trace.cg_calls,
        "bound_calls": trace.bound_calls,
        "theta_final": opt.theta,
    }


def _tensor(case: Case, name: str) -> Tensor:
    return torch.as_tensor(case.inputs[name], dtype=torch.float64)
