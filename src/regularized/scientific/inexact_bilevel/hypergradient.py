"""The gradient of a loss through the solution of an inner problem, by implicit differentiation and conjugate gradients.

For ``f(theta) = g(x*(theta))`` with ``x*(theta) = argmin_x h(x, theta)``:

    A q = grad g(x),   z = -B^T q,   A = grad_xx h,   B = d/dtheta grad_x h

exact at x = x* and q solved exactly. At an approximate solution it is approximate; see
:mod:`regularized.scientific.inexact_bilevel.bound` for by how much.
"""

from dataclasses import dataclass

from regularized.mechanisms.conjugate_gradient import conjugate_gradient
from regularized.scientific.inexact_bilevel.problem import BilevelProblem, Lower, Tree, Upper, norm

__all__ = ["Hypergradient", "hypergradient"]


@dataclass(frozen=True, slots=True)
class Hypergradient:
    """Gradient of the upper loss by theta, and how well it was computed.

    Args:
        gradient: like theta.
        q: like x, the solution of ``A q = grad g``; a good warm start for the next one.
        loss: g at x.
        cg_iterations: products with A.
        residual_norm: ``||A q - grad g||``.
        inner_gradient_norm: ``||grad_x h||`` at x. Divided by the constant of strong convexity it bounds
            ``||x - x*||``.
    """

    gradient: Tree
    q: Tree
    loss: float
    cg_iterations: int
    residual_norm: float
    inner_gradient_norm: float


def hypergradient(
    lower: Lower,
    upper: Upper,
    x: Tree,
    theta: Tree,
    *,
    cg_tol: float = 1e-6,
    max_cg: int = 2000,
    q: Tree | None = None,
) -> Hypergradient:
    """Gradient by theta of ``upper`` at the solution of the lower problem.

    One gradient of ``lower`` is taken with its graph; each CG iteration and the product with B^T are backward passes
    through that graph. ``requires_grad`` of x and theta is not looked at, and ``.grad`` is not touched.

    Args:
        lower: ``lower(x, theta)``, a scalar; twice differentiable and strongly convex in x.
        upper: ``upper(x)``, or ``upper(x, theta)`` where theta enters directly too; which, is read off its signature.
        x: the solution of the lower problem at theta, as well as it is known: a tensor, or tuples, lists and
            dictionaries of tensors of one dtype.
        theta: likewise.
        cg_tol: absolute tolerance of ``||A q - grad g||``; default 1e-6.
        max_cg: CG iterations at most; default 2000.
        q: warm start of CG, from an earlier call.

    Returns:
        Gradient, q, and how exact they are.

    Raises:
        NotPositiveDefinite: the lower problem is not strongly convex at x.
        ValueError: lower or upper does not depend on x, or lower not on theta; something is not a scalar or not finite.

    Examples:
        >>> import torch
        >>> theta = torch.tensor([1.0, 2.0])
        >>> result = hypergradient(
        ...     lambda x, t: 0.5 * (x - t).square().sum(), lambda x: x.square().sum(), theta, theta
        ... )
        >>> result.gradient, result.cg_iterations
        (tensor([2., 4.]), 1)
    """
    problem = BilevelProblem(lower, upper, x, theta)
    flat_x, flat_theta = problem.x_shape.flatten(x), problem.theta_shape.flatten(theta)
    loss, by_x, direct = problem.upper_gradient(flat_x, flat_theta)
    graph = problem.linearise(flat_x, flat_theta)
    solved = conjugate_gradient(
        graph.hessian,
        by_x,
        tol=cg_tol,
        x0=None if q is None else problem.x_shape.flatten(q),
        max_iterations=max_cg,
    )
    z = -graph.cross_transpose(solved.solution)
    if direct is not None:
        z = z + direct
    return Hypergradient(
        gradient=problem.theta_shape.unflatten(z),
        q=problem.x_shape.unflatten(solved.solution),
        loss=float(loss),
        cg_iterations=solved.iterations,
        residual_norm=solved.residual_norm,
        inner_gradient_norm=norm(graph.gradient),
    )
