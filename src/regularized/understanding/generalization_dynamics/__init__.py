"""High-dimensional dynamics of generalization error in neural networks."""

from regularized.understanding.generalization_dynamics.dynamics import LinearDynamics, Spectrum, steps_for
from regularized.understanding.generalization_dynamics.gradient_flow import GradientFlow
from regularized.understanding.generalization_dynamics.plot import plot_dynamics
from regularized.understanding.generalization_dynamics.report import frozen_drift, frozen_subspace

__all__ = [
    "GradientFlow",
    "LinearDynamics",
    "Spectrum",
    "frozen_drift",
    "frozen_subspace",
    "plot_dynamics",
    "steps_for",
]
