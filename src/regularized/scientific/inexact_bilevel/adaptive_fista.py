"""Accelerated gradient descent where nobody knows the Lipschitz constant: it is measured on the way.

FISTA for strongly convex functions, as in :mod:`regularized.scientific.inexact_bilevel.lower_solvers`, with two
safeguards that need nothing but the gradients that are taken anyway:

- the secant ``||grad h(z) - grad h(z')|| / ||z - z'||`` of two successive points is a lower bound of L on the way
  between them. Where it exceeds the L in use, the step was too long: it is taken again from the point before;
- momentum that points uphill, ``<grad h(z), x_new - x_old> > 0``, is dropped (O'Donoghue, Candes 2015).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from regularized.scientific.inexact_bilevel.lower_solvers import (
    InnerToleranceNotReached,
    LowerSolution,
    check_constants,
    momentum,
)

__all__ = ["AdaptiveFista"]

_MARGIN = 1.1  # over the secant that was seen: the next one may be a little larger
_JUMP = 4.0  # by which L grows at most in one go
_PATIENCE = 200  # iterations without a clearly smaller gradient after which rounding is all that moves


class AdaptiveFista:
    """An inner solver for :func:`~regularized.scientific.inexact_bilevel.solve_lower` that takes L for a first guess.

    An underestimate costs a few gradients, an overestimate by a factor c about sqrt(c) times as many: guess low.

    Attributes:
        L: the constant that the last solve ended with; nan before the first one.

    Examples:
        >>> scale = torch.tensor([1.0, 10.0], dtype=torch.float64)
        >>> solver = AdaptiveFista()
        >>> solution = solver(
        ...     lambda x: scale * x - 1.0, torch.zeros(2, dtype=torch.float64), mu=1.0, L=1.0, eps=1e-6,
        ...     max_iterations=500,
        ... )
        >>> [round(value, 5) for value in solution.x.tolist()], 2.0 < solver.L < 12.0
        ([1.0, 0.1], True)
    """

    def __init__(self) -> None:
        self.L = math.nan

    def __call__(
        self,
        gradient: Callable[[Tensor], Tensor],
        x: Tensor,
        *,
        mu: float,
        L: float,
        eps: float,
        max_iterations: int,
    ) -> LowerSolution:
        """A point at most eps from the solution, from the warm start x; reads the device in every iteration.

        Args:
            gradient: of h, a vector like x.
            x: warm start.
            mu: constant of strong convexity, > 0.
            L: first guess, >= mu.
            eps: distance to the solution that is wanted.
            max_iterations: gradients at most.

        Raises:
            InnerToleranceNotReached: there is none within the iterations.
        """
        check_constants(mu, L, eps)
        self.L = L
        z = old = x.detach()
        last_z, last_p = z, torch.zeros_like(z)
        best, since, norm, t_old = math.inf, 0, math.inf, 1.0
        for iteration in range(1, max_iterations + 1):
            p = gradient(z)
            norm = float(torch.linalg.vector_norm(p))
            if norm <= mu * eps:
                return LowerSolution(z - p / self.L, norm, iteration)
            moved = float(torch.linalg.vector_norm(z - last_z))
            # Between points that rounding can hardly tell apart the secant means nothing.
            if moved > 1e-10 * float(torch.linalg.vector_norm(z)):
                secant = float(torch.linalg.vector_norm(p - last_p)) / moved
                if iteration > 1 and not secant <= self.L:
                    # Too long a step led here: take it again, shorter. The secant over a far too long one says little.
                    most = _JUMP * self.L
                    self.L = min(_MARGIN * secant, most) if math.isfinite(secant) else most
                    z = old = torch.sub(last_z, last_p, alpha=1.0 / self.L)
                    t_old = 1.0
                    continue
            if not math.isfinite(norm):
                break
            if norm < 0.9 * best:
                best, since = norm, iteration
            elif iteration - since > _PATIENCE + 5.0 * math.sqrt(self.L / mu):
                raise InnerToleranceNotReached(norm, mu * eps, iteration, stagnated=True, x=z)
            last_z, last_p = z, p
            new = torch.sub(z, p, alpha=1.0 / self.L)
            if float(torch.sum(p * (new - old))) > 0.0:
                t_old = 1.0
            t, share = momentum(mu / self.L, t_old)
            z, old, t_old = torch.lerp(old, new, 1.0 + share), new, t
        raise InnerToleranceNotReached(norm, mu * eps, iteration, stagnated=False, x=z)
