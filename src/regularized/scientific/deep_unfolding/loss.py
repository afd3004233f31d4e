"""What the layers minimise, as a loss that needs no true signals.

:mod:`regularized.scientific.deep_unfolding.layer` has the paper and its symbols.
"""

from typing import Literal

from torch import Tensor, nn

from regularized.mechanisms.ranges import Choice, above, allowed

__all__ = ["SparseObjective"]


class SparseObjective(nn.Module):
    """What ISTA and IHT minimise: ``1/2 ||y - A x||² + penalty * ||x||``, one value a signal.

    As a loss it needs no true signals. The l0 norm is part of the value, but its gradient is 0: training on it sees the
    misfit on the present support only.

    Args:
        matrix: (M, N).
        penalty: lambda, > 0.
        norm: ``"l1"`` (default) or ``"l0"``.

    Raises:
        ValueError: matrix, penalty or norm is not as above.

    Examples:
        >>> import torch
        >>> objective = SparseObjective(torch.eye(2), 0.5)
        >>> objective(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([1.5000])
    """

    matrix: Tensor

    @allowed(norm=Choice("l1", "l0"))
    def __init__(self, matrix: Tensor, penalty: float, *, norm: Literal["l1", "l0"] = "l1") -> None:
        super().__init__()
        check_problem(matrix, penalty)
        self.register_buffer("matrix", matrix.detach().clone())
        self.penalty = penalty
        self.norm = norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Signals (..., N) and measurements (..., M) to values (...,)."""
        misfit = (y - x @ self.matrix.T).square().sum(dim=-1)
        size = x.abs().sum(dim=-1) if self.norm == "l1" else (x != 0).sum(dim=-1).to(x.dtype)
        return 0.5 * misfit + self.penalty * size


def check_problem(matrix: Tensor, penalty: float) -> None:
    if matrix.ndim != 2:
        raise ValueError(f"matrix must be (measurements, signal entries), got shape {tuple(matrix.shape)}")
    if matrix.is_complex():
        raise ValueError(
            "a complex matrix is not supported; stack real and imaginary parts: [[Re, -Im], [Im, Re]], signals alike"
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError("matrix must be finite")
    above(0.0)("penalty (lambda)", penalty)
