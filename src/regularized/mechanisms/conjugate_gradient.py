"""Conjugate gradients for a symmetric positive definite operator that is known by its products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["CGResult", "NotPositiveDefinite", "conjugate_gradient"]

Vector = TypeVar("Vector", Tensor, tuple[Tensor, ...])


class NotPositiveDefinite(ValueError):
    """A direction of no or negative curvature was met, so the linear system has no meaning.

    Args:
        curvature: the value of ``p^T A p`` that was met, for a direction p.
        length: ``||p||``.
        iteration: in which iteration.
    """

    def __init__(self, curvature: float, length: float, iteration: int) -> None:
        super().__init__(
            f"the operator is not positive definite: p^T A p = {curvature:.3g} with ||p|| = {length:.3g} in iteration "
            f"{iteration}. If A is the Hessian of an objective, that is not strongly convex here; add ridge, a term "
            "like 1e-3 * x.square().sum()"
        )
        self.curvature = curvature


@dataclass(frozen=True, slots=True)
class CGResult(Generic[Vector]):
    """What a solve returns.

    Args:
        solution: like b.
        iterations: products with A, that of the warm start's residual included.
        residual_norm: ``||b - A solution||``, by the recursion.
        converged: whether it is at most the tolerance.
    """

    solution: Vector
    iterations: int
    residual_norm: float
    converged: bool


def conjugate_gradient(
    matvec: Callable[[Vector], Vector],
    b: Vector,
    *,
    tol: float,
    x0: Vector | None = None,
    max_iterations: int = 2000,
    check_every: int | None = None,
) -> CGResult[Vector]:
    """Solve ``A x = b`` until ``||b - A x|| <= tol``.

    Where ``||b|| <= tol`` already, the answer is 0 without a product.

    Args:
        matvec: product with A; takes and returns what b is.
        b: one tensor of any shape, or a tuple of tensors of one dtype.
        tol: absolute tolerance of the residual's norm, >= 0.
        x0: warm start; costs one product, and none more where it is good enough.
        max_iterations: products after which to stop; default 2000.
        check_every: iterations between looks at the residual, each of which waits for the device. Default 1 on a CPU,
            10 elsewhere.

    Returns:
        The solution; ``converged`` is False where the iterations did not suffice.

    Raises:
        NotPositiveDefinite: a direction with ``p^T A p <= 0``.
        ValueError: tol is negative, or a value is not finite.

    Examples:
        >>> A = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> result = conjugate_gradient(lambda v: A @ v, torch.tensor([3.0, 6.0]), tol=1e-6)
        >>> result.solution, result.iterations
        (tensor([1., 2.]), 1)
    """
    if not tol >= 0.0:
        raise ValueError(f"tol must be a number >= 0, got {tol}")
    if isinstance(b, tuple):
        return _of_tuples(matvec, b, tol, x0, max_iterations, check_every)
    every = check_every or (1 if b.device.type == "cpu" else 10)
    size = float(torch.linalg.vector_norm(b))
    _check_finite(size, "the right-hand side")
    if size <= tol:
        return CGResult(torch.zeros_like(b), 0, size, True)
    iterations = 0
    if x0 is None:
        x, r = torch.zeros_like(b), b.clone()
    else:
        x = x0.clone()
        r = b - matvec(x0)
        iterations = 1
    p = r.clone()
    squared = torch.sum(r * r)
    norm = float(squared) ** 0.5
    _check_finite(norm, "the residual of the warm start")
    worst: Tensor | None = None  # the smallest curvature since the last look, and its direction's length
    while norm > tol and iterations < max_iterations:
        product = matvec(p)
        iterations += 1
        curvature = torch.sum(p * product)
        worst = curvature if worst is None else torch.minimum(worst, curvature)
        # Past convergence, between two looks, p is 0 and so is its curvature: then nothing moves any more.
        step = torch.where(squared > 0, squared / curvature, 0.0)
        x = torch.addcmul(x, step, p)
        r = torch.addcmul(r, step, product, value=-1.0)
        previous, squared = squared, torch.sum(r * r)
        if iterations % every == 0 or iterations >= max_iterations:
            smallest, old, new = torch.stack([worst, previous, squared]).tolist()
            _check_finite(abs(smallest), "a product with the operator")
            if old > 0.0 and not smallest > 0.0:
                raise NotPositiveDefinite(smallest, float(torch.linalg.vector_norm(p)), iterations)
            norm, worst = new**0.5, None
        p = torch.addcmul(r, torch.where(previous > 0, squared / previous, 0.0), p)
    return CGResult(x, iterations, norm, norm <= tol)


def _of_tuples(
    matvec: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    b: tuple[Tensor, ...],
    tol: float,
    x0: tuple[Tensor, ...] | None,
    max_iterations: int,
    check_every: int | None,
) -> CGResult[tuple[Tensor, ...]]:
    """One flat vector instead of many small ones: each operation is one call."""
    sizes = [part.numel() for part in b]

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    def split(flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(piece.view_as(part) for piece, part in zip(flat.split(sizes), b, strict=True))

    result = conjugate_gradient(
        lambda flat: join(matvec(split(flat))),
        join(b),
        tol=tol,
        x0=None if x0 is None else join(x0),
        max_iterations=max_iterations,
        check_every=check_every,
    )
    return CGResult(split(result.solution), result.iterations, result.residual_norm, result.converged)


def _check_finite(norm: float, what: str) -> None:
    if not norm < float("inf"):
        raise ValueError(f"conjugate gradients: {what} is not finite ({norm}); look for nan or inf in the objective")
