"""The gradient of a nuclear norm in closed form: the orthogonal polar factor of a matrix.

The nuclear norm ``|A|_*`` is the sum of the singular values of ``A = U S V^T``, and its gradient is ``U V^T``. Going
through autograd instead would differentiate U and V, which is ill-conditioned as soon as two singular values are near
each other or one is near zero, and costs a second pass; the value follows from the gradient, ``|A|_* = <A, U V^T>``.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Polar", "nuclear_norm", "polar_factor"]

Polar: TypeAlias = Literal["svd", "newton_schulz"]

# Quintic iterations x <- a x + b x^3 + c x^5 on every singular value. The first triple lifts a small x by 3.44 a step
# and sends what lies in (0, 1] near [0.7, 1.2] (Jordan et al. 2024, the Muon optimizer); the second is Newton-Schulz of
# order 3, which converges to 1 from there.
_LIFT, _LIFTS = (3.4445, -4.7750, 2.0315), 7
_SETTLE, _SETTLES = (15 / 8, -10 / 8, 3 / 8), 3


@torch.no_grad()
def polar_factor(matrix: Tensor, *, method: Polar = "svd") -> Tensor:
    """``U V^T`` of the thin singular value decomposition ``U S V^T``, without gradient.

    Singular values that are zero up to rounding are left out, which gives the subgradient of least norm.

    Args:
        matrix: (m, n), float32 or float64.
        method: ``"svd"``, exact (default), and on a CPU the faster one; or ``"newton_schulz"``, ten iterations of
            matrix products, for a GPU: equal up to rounding for singular values above 1e-4 of the largest, smaller ones
            are shrunk.

    Returns:
        (m, n), of the type of ``matrix``; zeros for a matrix of zeros, NaN for one that is not finite.

    Raises:
        ValueError: not a matrix of float32 or float64, or another method.

    Examples:
        >>> polar_factor(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    if matrix.ndim != 2 or matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"polar_factor needs a matrix of float32 or float64, got {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    if method == "svd":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        counts = s > s.amax() * max(matrix.shape) * torch.finfo(s.dtype).eps
        # Beside an infinite singular value all others count as zero; the factor of such a matrix is not known.
        polar: Tensor = torch.where(s.isfinite().all(), (u * counts) @ vh, torch.nan)
        return polar
    if method == "newton_schulz":
        return _newton_schulz(matrix)
    raise ValueError(f"method must be 'svd' or 'newton_schulz', got {method!r}")


@torch.no_grad()
def nuclear_norm(matrix: Tensor) -> Tensor:
    """Sum of the singular values, a scalar without gradient; its gradient is :func:`polar_factor`.

    Args:
        matrix: (m, n), float32 or float64.

    Examples:
        >>> nuclear_norm(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        tensor(5.)
    """
    total: Tensor = torch.linalg.svdvals(matrix).sum()
    return total


def _newton_schulz(matrix: Tensor) -> Tensor:
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    # The largest singular value is at most both the Frobenius norm and the root of the largest row and column sums.
    size = wide.abs()
    bound = torch.minimum(wide.norm(), (size.sum(dim=0).amax() * size.sum(dim=1).amax()).sqrt())
    x = wide / bound.clamp(min=torch.finfo(wide.dtype).tiny)
    for a, b, c in [_LIFT] * _LIFTS + [_SETTLE] * _SETTLES:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x
