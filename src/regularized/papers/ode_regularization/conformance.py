"""Golden vectors: steps on a given grid, their errors and stiffness, and gradients of the sums."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from regularized.evidence.conformance import Case, UnknownCase
from regularized.scientific.ode_regularization.ode_solver import SolverStatistics, odeint_on_grid
from regularized.scientific.ode_regularization.ode_tableaus import PAIRS
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.sde_solver import Increment, sdeint_on_grid
from regularized.scientific.ode_regularization.sde_tableaus import STOCHASTIC

TOLERANCE = 1e-9

# The vectors come from torchdiffeq, whose tsit5 goes on from the embedded solution.
_METHODS = {"tsit5": "tsit5_torchdiffeq"}

Outputs = Mapping[str, NDArray[Any]]


def tolerance(case: Case, output: str) -> float:
    """1e-9 on states, 1e-11 on stochastic steps; errors are differences of nearly equal sums over tight tolerances."""
    if case.has("in/dW"):
        return 1e-11
    if output.startswith(("eest", "R_E", "dRE")):
        return 1e-6
    return TOLERANCE


def compute(case: Case) -> Outputs:
    """States, errors and stiffness of an ordinary or a stochastic equation."""
    table = case.text("tableau")
    if case.has("in/W1", "in/W2", "in/y0", "in/grid") and table in PAIRS:
        return _ordinary(case)
    if case.has("in/A", "in/C", "in/u0", "in/grid", "in/dW", "in/dZ") and table in STOCHASTIC:
        return _stochastic(case)
    raise UnknownCase(case)


def _ordinary(case: Case) -> Outputs:
    names = [name for name in ("W1", "b1", "W2", "b2", "y0") if name in case.inputs]
    leaves = {name: torch.tensor(case.inputs[name]).requires_grad_() for name in names}
    no_bias = torch.zeros((), dtype=torch.float64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        column = t.expand(*y.shape[:-1], 1)
        hidden = torch.tanh(torch.cat([y, column], -1) @ leaves["W1"] + leaves.get("b1", no_bias))
        return torch.tanh(torch.cat([hidden, column], -1) @ leaves["W2"] + leaves.get("b2", no_bias))

    solution = odeint_on_grid(
        field,
        leaves["y0"],
        torch.tensor(case.inputs["grid"]),
        method=_METHODS.get(case.text("tableau"), case.text("tableau")),
        rtol=case.number("rtol"),
        atol=case.number("atol"),
    )
    statistics = solution.statistics
    if "stability_size" in case.hp:
        statistics.stability_size = case.number("stability_size")
    out = {"u": solution.states[1:], **_heuristics(statistics)}
    out["R_E_sum"] = solver_penalty(statistics, kind="error", reduction="sum")
    out["R_S_sum"] = solver_penalty(statistics, kind="stiffness", reduction="sum")
    for value, tag in (("R_E_sum", "dRE"), ("R_S_sum", "dRS")):
        gradients = torch.autograd.grad(out[value], list(leaves.values()), retain_graph=True)
        out |= {f"{tag}_d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return _arrays(out)


def _stochastic(case: Case) -> Outputs:
    if case.number("delta", 1.0) != 1.0:
        raise UnknownCase(case)
    a, c, u0, grid, dw, dz = (torch.tensor(case.inputs[name]) for name in ("A", "C", "u0", "grid", "dW", "dZ"))
    b = torch.tensor(case.inputs["b"]) if "b" in case.inputs else torch.zeros((), dtype=torch.float64)
    steps = grid.diff().tolist()
    path = [Increment(h, w, 0.5 * h * (w + z / 3**0.5)) for h, w, z in zip(steps, dw, dz, strict=True)]
    solution = sdeint_on_grid(
        lambda t, u: u.tanh() @ a + b * t.cos(),
        lambda t, u: 0.3 + 0.2 * (u @ c).sin(),
        u0,
        grid,
        increments=path,
        method=case.text("tableau"),
        rtol=case.number("rtol"),
        atol=case.number("atol"),
    )
    return _arrays({"u": solution.states[1:], **_heuristics(solution.statistics)})


def _heuristics(statistics: SolverStatistics) -> dict[str, Tensor]:
    sizes = torch.tensor(statistics.step_sizes, dtype=torch.float64)
    out = {"eest_dt": statistics.errors * sizes}
    # The vectors have the quotient for SOSRI, too, whose last two stages are at different times: no estimate there.
    if statistics.stability_size is None:
        statistics.stability_size = 1.0
    out["eigen_est"] = statistics.stiffness
    return out


def _arrays(out: Mapping[str, Tensor]) -> Outputs:
    return {name: value.detach().numpy() for name, value in out.items()}
