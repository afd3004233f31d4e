"""How far an inexact hypergradient may be from the exact one.

With ``||x - x*|| <= eps`` and ``||A q - grad g|| <= delta``:

    ||z - grad f|| <= omega = c eps + (||B|| / mu) delta + (L_B L_g / mu) eps²
    c = L_g ||B|| / mu + L_Ainv ||grad g|| ||B|| + L_B ||grad g|| / mu

==========  =====================  ===================================================================
paper       here                   meaning
==========  =====================  ===================================================================
L_g         ``upper``              Lipschitz constant of grad g
||B||       ``cross``              norm of B = d/dtheta grad_x h
L_B         ``cross_lipschitz``    Lipschitz constant of B in x, near x
L_Ainv      ``inverse_lipschitz``  that of the inverse Hessian; at most L_A / mu²
==========  =====================  ===================================================================

They are given (then omega is a bound), or estimated (then it is a rule of thumb). The official code estimates them too,
but by secants over perturbations of length about sqrt(n) that are not divided by that length, at the noise itself
instead of around x, and with two more linear solves. Here: secants of length eps along the inner residual, and power
iterations that go on from one call to the next.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from regularized.scientific.inexact_bilevel.problem import BilevelProblem, Linearised, Tree, norm

__all__ = ["BilevelConstants", "ErrorBound", "EstimatedBound", "Inexact", "RigorousBound"]

Constant: TypeAlias = float | Callable[[Tree, Tree], float]


@dataclass(frozen=True, slots=True)
class BilevelConstants:
    """Constants of a bilevel problem, each a number or ``function(x, theta)``; None where unknown.

    Args:
        upper: L_g.
        cross: ``||B||``.
        cross_lipschitz: L_B.
        inverse_lipschitz: L_Ainv.
        direct_lipschitz: Lipschitz constant in x of the direct gradient by theta; needed for ``upper(x, theta)`` alone.

    Raises:
        TypeError: (when it is used) a constant is neither a number nor a function.

    Examples:
        >>> BilevelConstants(upper=1.0, cross=lambda x, theta: theta.exp().max()).cross_lipschitz is None
        True
    """

    upper: Constant | None = None
    cross: Constant | None = None
    cross_lipschitz: Constant | None = None
    inverse_lipschitz: Constant | None = None
    direct_lipschitz: Constant | None = None


@dataclass(frozen=True, slots=True)
class Inexact:
    """An inexact hypergradient and what it was made of; vectors are flat.

    Args:
        x: eps-accurate inner solution.
        theta: where.
        graph: of grad_x h at (x, theta).
        q: delta-accurate solution of ``A q = grad g``.
        product: ``A q``.
        transposed: ``B^T q``.
        upper_gradient: grad g by x.
        direct: grad g by theta, or None.
        mu: constant of strong convexity.
    """

    x: Tensor
    theta: Tensor
    graph: Linearised
    q: Tensor
    product: Tensor
    transposed: Tensor
    upper_gradient: Tensor
    direct: Tensor | None
    mu: float

    @property
    def z(self) -> Tensor:
        """The hypergradient, (d,)."""
        return -self.transposed if self.direct is None else self.direct - self.transposed


class ErrorBound(Protocol):
    """What the method asks of a bound."""

    def omega(self, at: Inexact, eps: float, delta: float) -> float:
        """Bound on the error of the hypergradient."""
        ...

    def upper_lipschitz(self, x: Tensor, theta: Tensor) -> float:
        """L_g, for the errors of function values."""
        ...

    def moved(self) -> None:
        """Theta has moved: constants near the old solution say nothing any more."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it up again."""
        ...


def combine(
    *,
    eps: float,
    delta: float,
    mu: float,
    upper_gradient: float,
    upper: float,
    cross: float,
    cross_lipschitz: float,
    inverse_lipschitz: float,
    direct_lipschitz: float = 0.0,
) -> float:
    """omega, from its constants; ``upper_gradient`` is ``||grad g||``.

    Examples:
        >>> combine(eps=0.5, delta=0.5, mu=2.0, upper_gradient=1.0, upper=4.0, cross=3.0, cross_lipschitz=0.0,
        ...     inverse_lipschitz=0.0)
        3.75
    """
    c = upper * cross / mu + inverse_lipschitz * upper_gradient * cross + cross_lipschitz * upper_gradient / mu
    return (c + direct_lipschitz) * eps + cross / mu * delta + cross_lipschitz * upper / mu * eps**2


class RigorousBound:
    """omega from constants that are given.

    Args:
        problem: whose trees the functions among the constants get.
        constants: all of them; ``direct_lipschitz`` only where ``upper`` takes theta.

    Raises:
        ValueError: one is missing.

    Examples:
        >>> problem = BilevelProblem(lambda x, t: (x * t).sum(), lambda x: x.sum(), torch.ones(1), torch.ones(1))
        >>> RigorousBound(problem, BilevelConstants(upper=0.0, cross=1.0, cross_lipschitz=0.0))
        Traceback (most recent call last):
        ValueError: a rigorous bound needs the constants ['inverse_lipschitz']; give them, or use bound="heuristic"
    """

    def __init__(self, problem: BilevelProblem, constants: BilevelConstants) -> None:
        needed = ["upper", "cross", "cross_lipschitz", "inverse_lipschitz"]
        needed += ["direct_lipschitz"] if problem.upper_takes_theta else []
        if missing := [name for name in needed if getattr(constants, name) is None]:
            raise ValueError(f'a rigorous bound needs the constants {missing}; give them, or use bound="heuristic"')
        self._problem = problem
        self._constants = constants

    def omega(self, at: Inexact, eps: float, delta: float) -> float:
        """A true bound, for true constants."""
        values = {
            name: evaluate(self._problem, getattr(self._constants, name), at.x, at.theta)
            for name in ("upper", "cross", "cross_lipschitz", "inverse_lipschitz", "direct_lipschitz")
            if getattr(self._constants, name) is not None
        }
        return combine(eps=eps, delta=delta, mu=at.mu, upper_gradient=norm(at.upper_gradient), **values)

    def upper_lipschitz(self, x: Tensor, theta: Tensor) -> float:
        """L_g as given."""
        assert self._constants.upper is not None
        return evaluate(self._problem, self._constants.upper, x, theta)

    def moved(self) -> None:
        """Nothing is remembered."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is remembered."""


class EstimatedBound:
    """omega from estimates, where no constant is given: a rule of thumb, from below.

    A call costs one lower gradient and four products with second derivatives, and no linear solve.

    - L_B and L_A: ``||B(x + u)^T q - B(x)^T q|| / (||u|| ||q||)`` and likewise for A, with u along the inner residual,
      the direction in which x is known to be off, of length eps. The largest since theta moved counts.
    - L_Ainv ``||grad g||`` is then ``L_A ||q|| / mu``.
    - ``||B||`` and L_g: one step of a power iteration a call, which goes on from the last call.

    Args:
        problem: whose derivatives are taken.
        constants: those that are known, used as they are.

    Examples:
        >>> one = torch.ones(1)
        >>> problem = BilevelProblem(lambda x, t: (x * t).sum(), lambda x: x.square().sum(), one, one)
        >>> EstimatedBound(problem, BilevelConstants()).upper_lipschitz(one, one)
        2.0
    """

    def __init__(self, problem: BilevelProblem, constants: BilevelConstants) -> None:
        self._problem = problem
        self._constants = constants
        self._largest = {"cross_lipschitz": 0.0, "hessian_lipschitz": 0.0, "direct_lipschitz": 0.0}
        self._cross_direction: Tensor | None = None
        self._upper_direction: Tensor | None = None
        self._upper: float = 0.0

    def omega(self, at: Inexact, eps: float, delta: float) -> float:
        """The estimate."""
        self._secants(at, eps)
        known = {name: self._known(name, at) for name in ("upper", "cross", "cross_lipschitz", "inverse_lipschitz")}
        size = norm(at.upper_gradient)
        inverse = self._largest["hessian_lipschitz"] * norm(at.q) / (at.mu * size) if size > 0.0 else 0.0
        estimates = {
            "upper": lambda: self.upper_lipschitz(at.x, at.theta, at.upper_gradient),
            "cross": lambda: self._cross_norm(at),
            "cross_lipschitz": lambda: self._largest["cross_lipschitz"],
            "inverse_lipschitz": lambda: inverse,
        }
        values = {name: estimates[name]() if value is None else value for name, value in known.items()}
        direct = self._known("direct_lipschitz", at)
        values["direct_lipschitz"] = self._largest["direct_lipschitz"] if direct is None else direct
        return combine(eps=eps, delta=delta, mu=at.mu, upper_gradient=size, **values)

    def upper_lipschitz(self, x: Tensor, theta: Tensor, start: Tensor | None = None) -> float:
        """L_g: given, or the largest curvature of g that the power iteration has found near x."""
        if self._constants.upper is not None:
            return evaluate(self._problem, self._constants.upper, x, theta)
        direction = self._upper_direction
        if direction is None or not norm(direction) > 0.0:
            direction = self._problem.upper_gradient(x, theta)[1] if start is None else start
        product = self._problem.upper_hessian(x, theta, direction)
        size = norm(direction)
        self._upper = norm(product) / size if size > 0.0 else 0.0
        self._upper_direction = product / (norm(product) or 1.0)
        return self._upper

    def moved(self) -> None:
        """Secants are taken anew."""
        self._largest = dict.fromkeys(self._largest, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Secants and directions."""
        return {
            "largest": dict(self._largest),
            "cross_direction": self._cross_direction,
            "upper_direction": self._upper_direction,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        self._largest = dict(state["largest"])
        self._cross_direction, self._upper_direction = state["cross_direction"], state["upper_direction"]

    def _known(self, name: str, at: Inexact) -> float | None:
        constant = getattr(self._constants, name)
        return None if constant is None else evaluate(self._problem, constant, at.x, at.theta)

    def _secants(self, at: Inexact, eps: float) -> None:
        wanted = ["cross_lipschitz", "inverse_lipschitz"] + (["direct_lipschitz"] if at.direct is not None else [])
        size_q = norm(at.q)
        if all(getattr(self._constants, name) is not None for name in wanted) or not size_q > 0.0:
            return
        residual = at.graph.gradient if norm(at.graph.gradient) > 0.0 else at.q
        # Not so short that the difference is rounding.
        shortest = torch.finfo(at.x.dtype).eps ** 0.5 * (1.0 + norm(at.x))
        length = max(eps, shortest)
        u = residual * (length / norm(residual))
        product, transposed = self._problem.linearise(at.x + u, at.theta).both(at.q)
        found = {
            "cross_lipschitz": norm(transposed - at.transposed) / (length * size_q),
            "hessian_lipschitz": norm(product - at.product) / (length * size_q),
        }
        if at.direct is not None:
            moved = self._problem.upper_gradient(at.x + u, at.theta)[2]
            assert moved is not None
            found["direct_lipschitz"] = norm(moved - at.direct) / length
        for name, value in found.items():
            self._largest[name] = max(self._largest[name], value)

    def _cross_norm(self, at: Inexact) -> float:
        """One step of the power iteration of B^T B: ``||B^T w|| / ||w||`` for w = B v."""
        v = self._cross_direction
        if v is None or not norm(v) > 0.0:
            v = at.transposed if norm(at.transposed) > 0.0 else torch.ones_like(at.theta)
        w = at.graph.cross(v)
        if not (size := norm(w)) > 0.0:
            return 0.0
        back = at.graph.cross_transpose(w)
        self._cross_direction = back / (norm(back) or 1.0)
        return norm(back) / size


def evaluate(problem: BilevelProblem, constant: Constant, x: Tensor, theta: Tensor) -> float:
    """A constant that is a number or a function of the trees."""
    if callable(constant):
        with torch.no_grad():
            return float(constant(problem.x_shape.unflatten(x), problem.theta_shape.unflatten(theta)))
    return float(constant)
