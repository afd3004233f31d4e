"""Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal Solver Heuristics."""

from regularized.scientific.ode_regularization.layer import NeuralODE, NeuralSDE
from regularized.scientific.ode_regularization.local import LocalNeuralODE, RandomEndTime
from regularized.scientific.ode_regularization.ode_solver import odeint, odeint_on_grid
from regularized.scientific.ode_regularization.penalty import solver_penalty
from regularized.scientific.ode_regularization.sde_solver import BrownianPath, sdeint, sdeint_on_grid
from regularized.scientific.ode_regularization.term import SolverRegularization, exponential_decay

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
