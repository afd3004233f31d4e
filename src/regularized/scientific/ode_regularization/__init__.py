"""Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal Solver Heuristics."""

from regularized.scientific.ode_regularization.layer import (
    NeuralODE,
    NeuralSDE,
    SolverRegularization,
    exponential_decay,
    solver_penalty,
)
from regularized.scientific.ode_regularization.local import LocalNeuralODE, RandomEndTime
from regularized.scientific.ode_regularization.ode_solver import odeint, odeint_on_grid
from regularized.scientific.ode_regularization.sde_solver import BrownianPath, sdeint, sdeint_on_grid

__all__ = [
    "BrownianPath",
    "LocalNeuralODE",
    "NeuralODE",
    "NeuralSDE",
    "RandomEndTime",
    "SolverRegularization",
    "exponential_decay",
    "odeint",
    "odeint_on_grid",
    "sdeint",
    "sdeint_on_grid",
    "solver_penalty",
]
