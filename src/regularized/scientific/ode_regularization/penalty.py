"""Regularising the solver's own heuristics: for neural differential equations that need ever more evaluations.

An adaptive solver computes a local error for each step, and nearly for free an estimate of stiffness. Added to the
loss, they teach dynamics that the solver integrates in few steps, without higher derivatives.

    Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing
    Internal Solver Heuristics", ICML 2021, arXiv 2105.03918. Official code: avik-pal/RegNeuralDE.jl at bb252b5 (MIT).

============  ====================  ===========================================================================
paper         here                  meaning
============  ====================  ===========================================================================
E_j abs h_j   ``"error"``           scaled local error of step j times its length
S_j           ``"stiffness"``       estimate of stiffness over the size of the stability region
R_ES          ``"both"``            error + 0.1 stiffness
lambda        ``weight``            coefficient, falling exponentially over the epochs
============  ====================  ===========================================================================

Paper and code differ: the paper sums over the steps, the code takes the mean (of errors), the largest (of stiffness for
ODEs) or the sum (its spiral). ``reduction`` offers all three, by default the mean. The paper speaks of the local error;
the code, and we, divide it by the tolerance. The code's mean may hold one more term from before the first step; ours
does not.
"""

from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from regularized.mechanisms.ranges import Choice
from regularized.scientific.ode_regularization.solver_statistics import SolverStatistics

__all__ = ["solver_penalty"]

Kind: TypeAlias = Literal["error", "stiffness", "both"]
Reduction: TypeAlias = Literal["mean", "sum", "max"]
KIND = Choice("error", "stiffness", "both")
REDUCTION = Choice("mean", "sum", "max")
STIFFNESS_SHARE = 0.1  # of the combined regulariser, from the official code


def solver_penalty(statistics: SolverStatistics, *, kind: Kind = "error", reduction: Reduction = "mean") -> Tensor:
    """The regulariser of one solve: R_E, R_S or R_ES.

    Errors are relative to the tolerance, so an accepted step has at most 1, and the mean is at most the mean step: this
    is why coefficients of 10 to 100 are usual.

    Args:
        statistics: of a solve with gradients.
        kind: ``"error"`` (default), ``"stiffness"`` or ``"both"``.
        reduction: over the steps: ``"mean"`` (default), ``"sum"`` or ``"max"``.

    Returns:
        Scalar; the mean over rows where the solve had ``norm="sample"``.

    Raises:
        ValueError: unknown kind or reduction, stiffness of a method that has no estimate, or a solve without steps.
        RuntimeError: the statistics have no graph, or were already back-propagated.

    Examples:
        >>> from regularized.scientific.ode_regularization.ode_solver import odeint
        >>> rate = torch.tensor(-2.0, requires_grad=True)
        >>> solution = odeint(lambda t, u: rate * u, torch.ones(3, 1), [0.0, 1.0])
        >>> penalty = solver_penalty(solution.statistics, kind="stiffness")
        >>> round(float(penalty) * 3.5068, 3)
        2.0
    """
    KIND("kind", kind)
    REDUCTION("reduction", reduction)
    if not statistics.recorded:
        raise RuntimeError(
            "these solver statistics carry no graph: they come from eval() mode or from a solve without gradients. "
            "Call the layer in train() mode, with gradients switched on, before the penalty"
        )
    if statistics.spent:
        raise RuntimeError(
            "these solver statistics were back-propagated already; call the layer on the new batch before its penalty"
        )
    if not statistics.step_sizes:
        raise ValueError(
            "a solve at a single time takes no step, so that there is nothing to penalise; give an end time"
        )
    values = torch.zeros(())
    if kind in ("error", "both"):
        values = statistics.errors_times_steps
    if kind in ("stiffness", "both"):
        stiffness = statistics.stiffness / cast(float, statistics.stability_size)
        values = stiffness if kind == "stiffness" else values + STIFFNESS_SHARE * stiffness
    if reduction == "max":
        penalty = values.amax(dim=0).mean()
    else:
        penalty = (values.mean(dim=0) if reduction == "mean" else values.sum(dim=0)).mean()
    if penalty.requires_grad:
        penalty.register_hook(lambda _gradient: setattr(statistics, "spent", True))
    return penalty
