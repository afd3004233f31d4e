"""Weights as matrices, and their thin singular value decomposition."""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, count

__all__ = ["SVD", "thin_svd", "weight_like", "weight_matrix"]

# Shapes: o outputs, i inputs (of a convolution: channels x kernel), k singular values that are kept.


class SVD(NamedTuple):
    """``matrix = left @ diag(values) @ right``.

    Attributes:
        left: (o, k), orthonormal columns.
        values: (k,), descending, >= 0.
        right: (k, i), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def weight_matrix(module: nn.Module, name: str = "the layer") -> Tensor:
    """The weight of a layer as the matrix (o, i) that it multiplies its input with; a view.

    Args:
        module: ``nn.Linear``, ``Conv1D`` of transformers (GPT-2; its weight is stored transposed), or ``nn.Conv2d``
            without groups, whose kernel becomes (o, channels * height * width).
        name: name of the layer, for errors.

    Raises:
        TypeError: another kind of layer, or a quantized weight.
        ValueError: a convolution with groups.

    Examples:
        >>> weight_matrix(nn.Conv2d(3, 8, 5)).shape
        torch.Size([8, 75])
    """
    transposed = _is_transposed(module)
    if not (transposed or isinstance(module, nn.Linear | nn.Conv2d)):
        raise TypeError(
            f"{name} is a {type(module).__name__}; the weight of nn.Linear, nn.Conv2d and transformers' Conv1D can be "
            "split, choose such layers"
        )
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(
            f"the weight of {name} is quantized ({type(module).__name__}, {weight.dtype}), and a decomposition needs "
            "the numbers themselves; dequantize it first, for example load the model in bfloat16"
        )
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            raise ValueError(f"{name} is a convolution with groups={module.groups}; only groups=1 is one matrix")
        return weight.flatten(1)
    return weight.T if transposed else weight


def weight_like(module: nn.Module, matrix: Tensor) -> Tensor:
    """A matrix (o, i) in the layout of the module's weight, the inverse of :func:`weight_matrix`; dtype unchanged.

    Examples:
        >>> layer = nn.Conv2d(3, 8, 5)
        >>> torch.equal(weight_like(layer, weight_matrix(layer)), layer.weight)
        True
    """
    return matrix.T if _is_transposed(module) else matrix.reshape(cast(Tensor, module.weight).shape)


@allowed(niter=count(0).or_none("exact"))
def thin_svd(matrix: Tensor, *, rank: int | None = None, niter: int | None = None, name: str = "weight") -> SVD:
    """Singular value decomposition, computed in float32 at least whatever the dtype of the matrix.

    Args:
        matrix: (o, i).
        rank: keep so many of the largest singular values; default all ``min(o, i)``.
        niter: None (default) decomposes exactly. A number >= 0 computes the leading ``rank`` alone by a randomised
            range finder with so many power iterations and no more columns (Halko et al. 2011; 4 is usually enough):
            faster for large matrices, with errors where the singular values fall slowly. It is seeded.
        name: what the matrix is, for errors.

    Returns:
        The decomposition, float32 (float64 for a float64 matrix), each part contiguous.

    Raises:
        ValueError: not a matrix, a rank outside [1, min(o, i)], a negative ``niter``, or values that are not finite.

    Examples:
        >>> matrix = torch.randn(5, 7)
        >>> left, values, right = thin_svd(matrix)
        >>> torch.allclose((left * values) @ right, matrix, atol=1e-5)
        True
        >>> thin_svd(matrix.bfloat16(), rank=2).right.dtype
        torch.float32
    """
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(matrix.shape)}")
    limit = min(matrix.shape)
    if rank is not None and not 1 <= rank <= limit:
        raise ValueError(
            f"the rank for {name} must be in [1, {limit}], the smaller side of {tuple(matrix.shape)}; got {rank}"
        )
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    if matrix.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all()):  # NaN passes through
        raise ValueError(f"{name} holds values that are NaN or infinite; check the checkpoint that it came from")
    if niter is None or rank is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range(matrix, rank, niter)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    return SVD(left[:, :rank].contiguous(), values[:rank].contiguous(), right[:rank].contiguous())


def _range(matrix: Tensor, columns: int, niter: int) -> Tensor:
    """Orthonormal (o, columns) that nearly span the leading left singular vectors."""
    generator = torch.Generator().manual_seed(0)  # its own, so that the global random state stays as it was
    draw = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis: Tensor = torch.linalg.qr(matrix @ draw).Q
    for _ in range(niter):
        basis = torch.linalg.qr(((basis.T @ matrix) @ matrix.T).T).Q
    return basis


def _is_transposed(module: nn.Module) -> bool:
    # transformers' Conv1D is known by its form, so that transformers need not be there.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
