"""Golden vectors of the dynamics: the formulas by adaptive quadrature, and finite systems by matrix exponentials."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow

TOLERANCE = 1e-8

# The vectors' own best time is the lowest of these.
_GRID = torch.logspace(-2, 4, 4001, dtype=torch.float64)


def tolerance(case: Case, output: str) -> float:
    """Quadrature to 1e-9, exponentials to 1e-8; the best time as finely as the grid of the vectors tells it."""
    if output == "t_opt":
        # Two steps of the grid; more where the error is level to the last digits, so that rounding decides.
        errors = _theory(case).test_error(_GRID)
        level = _GRID[errors <= errors.min() * (1.0 + 1e-15)]
        spread = float((level - level[0]).max()) if float(level[-1]) < float(_GRID[-1]) else float(_GRID[-1])
        return max(5e-3, spread / max(1.0, float(level[0])))
    if output == "gen_opt":
        return 1e-6
    return 1e-8 if case.has("in/X") else 1e-9


def compute(case: Case) -> Mapping[str, NDArray[Any]]:
    """Curves and optimum of an ensemble, or the course of one data set."""
    if case.has("in/X", "in/y", "in/t"):
        out = _finite(case)
    elif case.has("in/t", "hp/alpha"):
        dynamics, t = _theory(case), torch.as_tensor(case.inputs["t"])
        errors = dynamics.test_error(_GRID)
        best = int(errors.argmin())
        out = {
            "gen_error": dynamics.test_error(t),
            "train_error": dynamics.train_error(t),
            "t_opt": _GRID[best],
            "gen_opt": errors[best],
        }
    else:
        raise UnknownCase(case)
    return {name: np.asarray(value) for name, value in out.items()}


def _theory(case: Case) -> LinearDynamics:
    return LinearDynamics(
        case.number("alpha"),
        signal=case.number("sigma_w2", 1.0),
        noise=case.number("sigma_eps2", 0.0),
        start=case.number("sigma_02", 0.0),
        weight_decay=case.number("gamma", 0.0),
    )


def _finite(case: Case) -> dict[str, Tensor]:
    given = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in case.inputs.items()}
    flow = GradientFlow(given["X"], given["y"], initial=given.get("w0"), weight_decay=case.number("gamma", 0.0))
    t = given["t"]
    out = {"w_t": flow.weights(t), "train_mse": flow.train_error(t)}
    if "w_teacher" in given:
        out["pop_error"] = flow.population_error(given["w_teacher"], t, noise=case.number("sigma_eps2", 0.0))
    return out
