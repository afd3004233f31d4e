"""Smallest and largest eigenvalue of a symmetric operator that is known by its products with vectors (Lanczos)."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["extreme_eigenvalues"]


def extreme_eigenvalues(
    matvec: Callable[[Tensor], Tensor], start: Tensor, *, steps: int = 40, tol: float = 1e-3
) -> tuple[float, float]:
    """Estimates of the two ends of a spectrum, from inside it.

    Each step costs one product. All directions are kept and orthogonalised against, n x ``steps`` numbers: without that
    rounding brings eigenvalues back that were found already. Reads the device once a step.

    Args:
        matvec: symmetric; (n,) to (n,).
        start: (n,) first direction, for example random; not zero. An eigenvalue whose vector is orthogonal to it is
            not seen.
        steps: most products; default 40, of which n are enough.
        tol: stop when both estimates are known to this share of themselves; default 0.001.

    Returns:
        Smallest and largest Ritz value: the true ends lie at or outside them.

    Raises:
        ValueError: ``start`` is zero or not finite, or so is a product.

    Examples:
        >>> entries = torch.tensor([-1.0, 0.5, 3.0, 4.0], dtype=torch.float64)
        >>> low, high = extreme_eigenvalues(lambda v: entries * v, torch.ones(4, dtype=torch.float64))
        >>> round(low, 6), round(high, 6)
        (-1.0, 4.0)
    """
    length = float(start.norm())
    if not 0.0 < length < float("inf"):
        raise ValueError(f"start must be finite and not zero, its norm is {length}")
    directions = (start / length)[None]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    low = high = 0.0
    for _ in range(min(steps, start.numel())):
        residual = matvec(directions[-1])
        diagonal.append(float(residual @ directions[-1]))
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            residual = residual - (directions @ residual) @ directions
        norm = float(residual.norm())
        if not norm < float("inf"):
            raise ValueError("a product with the operator is not finite")
        small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if off_diagonal:
            beside = torch.diag(torch.tensor(off_diagonal, dtype=torch.float64), 1)
            small = small + beside + beside.T
        values, vectors = torch.linalg.eigh(small)
        low, high = float(values[0]), float(values[-1])
        # A Ritz value is as far from an eigenvalue as its residual is long.
        to_low, to_high = float(norm * vectors[-1, 0].abs()), float(norm * vectors[-1, -1].abs())
        if norm <= 1e-12 * max(abs(low), abs(high)) or (to_low <= tol * abs(low) and to_high <= tol * abs(high)):
            break
        off_diagonal.append(norm)
        directions = torch.cat([directions, (residual / norm)[None]])
    return low, high
