"""Hadamard rotations: an outlier is spread over its block before rounding, and the product does not notice.

=======  ============================================================================================================
H        the Hadamard matrix of Sylvester, n x n with entries +-1 / sqrt(n), symmetric, and its own inverse
D        a diagonal of signs: of a seed (*random*), or all +1 (*deterministic*)
=======  ============================================================================================================

Both operands of a product are rotated along the axis that it sums over: (x D H)(w D H)^T = x D H H^T D^T w^T = x w^T.
The signs come first: behind H they would only turn signs of what is rounded, and rounding is symmetric.

Which of the two is open. Training in MXFP4 with random signs and stochastic rounding is reported to work (Tseng et al.
2025); for the weight gradient on native MXFP4 hardware, arXiv 2605.09825 reports that these two do not help, and that
the deterministic rotation does. Both are here, for each product its own.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from regularized.compression.low_precision.blocking import padded

__all__ = ["check_hadamard_block", "hadamard", "random_signs"]

_LARGEST_MATRIX = 256  # beyond, the transform is taken in two: the matrix product is cheap while H stays in the cache


def check_hadamard_block(block: int) -> None:
    """Refuse what is no power of two.

    Raises:
        ValueError: with the nearest sizes.

    Examples:
        >>> check_hadamard_block(48)
        Traceback (most recent call last):
        ...
        ValueError: the block of a Hadamard rotation must be a power of two, got 48; the nearest are 32 and 64
    """
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or block & (block - 1):
        below = 1 << max(int(block).bit_length() - 1, 0)
        raise ValueError(
            f"the block of a Hadamard rotation must be a power of two, got {block}; the nearest are {below} and "
            f"{2 * below}"
        )


def hadamard(x: Tensor, *, block: int, axis: int = -1, signs: Tensor | None = None) -> Tensor:
    """Rotate blocks of an axis: x D H. Applied twice without signs it is the identity.

    Args:
        x: a floating type.
        block: entries n that are rotated together, a power of two; H is block-diagonal where the axis is longer.
        axis: default the last; zeros are added up to a multiple of the block, so the result may be longer.
        signs: (n,) of +-1, the diagonal D of every block; default all +1.

    Raises:
        ValueError: the block is no power of two; or there are not n signs.

    Examples:
        >>> hadamard(torch.tensor([2.0, 0.0, 0.0, 0.0]), block=4)
        tensor([1., 1., 1., 1.])
    """
    check_hadamard_block(block)
    if signs is not None and signs.shape != (block,):
        raise ValueError(f"a rotation of blocks of {block} needs {block} signs, got shape {tuple(signs.shape)}")
    axis %= x.ndim
    view = padded(x, block, axis).unflatten(axis, (-1, block))
    if signs is not None:
        view = view * signs.to(x.dtype).view(block, *[1] * (x.ndim - 1 - axis))
    if axis == x.ndim - 1:
        return _transformed(view).flatten(axis, axis + 1)
    if axis == x.ndim - 2 and block <= _LARGEST_MATRIX:  # H is symmetric, so it may stand on the other side
        turned: Tensor = _matrix(block, view.dtype, view.device) @ view
        return turned.flatten(axis, axis + 1)
    return _transformed(view.movedim(axis + 1, -1)).movedim(-1, axis + 1).flatten(axis, axis + 1)


def _transformed(view: Tensor) -> Tensor:
    n = view.shape[-1]
    if n <= _LARGEST_MATRIX:
        return view @ _matrix(n, view.dtype, view.device)
    inner = view.unflatten(-1, (-1, _LARGEST_MATRIX)) @ _matrix(_LARGEST_MATRIX, view.dtype, view.device)
    return _transformed(inner.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


@lru_cache(maxsize=32)
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(n)).to(device, dtype)


def random_signs(block: int, generator: torch.Generator) -> Tensor:
    """(block,) float32 of +1 and -1.

    Args:
        block: n.
        generator: on the device where the signs are used.

    Examples:
        >>> random_signs(4, torch.Generator().manual_seed(1)).abs()
        tensor([1., 1., 1., 1.])
    """
    bits = torch.randint(2, (block,), generator=generator, device=generator.device)
    return bits.float().mul_(2.0).sub_(1.0)
