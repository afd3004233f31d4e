"""Views of a tensor in which the entries that share a scale have axes of their own."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Granularity", "check_granularity", "describe", "join", "padded", "scales_per_value", "split"]

Granularity: TypeAlias = Literal["tensor", "row"] | int | tuple[int, int]
"""What shares a scale: all entries; those along the axis (of a product: the one that is summed over); so many of them
in a row; or a tile of (rows, columns) of the last two axes."""


def check_granularity(name: str, value: Granularity) -> None:
    """Refuse what is none.

    Raises:
        ValueError: it is neither a word, a size, nor a pair of sizes.
    """
    sizes = value if isinstance(value, tuple) else (value,)
    if value in ("tensor", "row") or (
        len(sizes) in (1, 2) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
    ):
        return
    raise ValueError(f'{name} must be "tensor", "row", a block size or a tile (rows, columns), got {value!r}')


def describe(granularity: Granularity) -> str:
    """In words for a table.

    Examples:
        >>> describe("row"), describe(32), describe((128, 128))
        ('a row', '32', '128 x 128')
    """
    if isinstance(granularity, tuple):
        return f"{granularity[0]} x {granularity[1]}"
    return f"a {granularity}" if isinstance(granularity, str) else str(granularity)


def scales_per_value(granularity: Granularity) -> float:
    """Scales over values, where they are a constant; 0 for rows and tensors, where the scales weigh nothing.

    Examples:
        >>> scales_per_value(32), scales_per_value((2, 8)), scales_per_value("row")
        (0.03125, 0.0625, 0.0)
    """
    if isinstance(granularity, str):
        return 0.0
    return 1.0 / (math.prod(granularity) if isinstance(granularity, tuple) else granularity)


def split(x: Tensor, granularity: Granularity, axis: int) -> tuple[Tensor, tuple[int, ...]]:
    """A view (a copy where zeros must be added) and the axes of it that share a scale.

    Args:
        x: at least one axis; two for tiles.
        granularity: what shares a scale.
        axis: along which a row or block lies; no matter for tensors and tiles.

    Raises:
        ValueError: a tile of a tensor with fewer than two axes.

    Examples:
        >>> view, axes = split(torch.zeros(4, 70), 32, -1)
        >>> view.shape, axes
        (torch.Size([4, 3, 32]), (2,))
    """
    axis %= max(x.ndim, 1)
    if granularity == "tensor":
        return x, tuple(range(x.ndim))
    if granularity == "row":
        return x, (axis,)
    if isinstance(granularity, tuple):
        if x.ndim < 2:
            raise ValueError(f"a tile {granularity} needs two axes, got a tensor of shape {tuple(x.shape)}")
        rows, columns = granularity
        x = padded(padded(x, rows, x.ndim - 2), columns, x.ndim - 1)
        return x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)), (x.ndim - 1, x.ndim + 1)
    assert isinstance(granularity, int)
    return padded(x, granularity, axis).unflatten(axis, (-1, granularity)), (axis + 1,)


def padded(x: Tensor, multiple: int, axis: int) -> Tensor:
    """Zeros added behind, up to a multiple of a length; the tensor itself where it is one.

    Args:
        x: the tensor.
        multiple: of it.
        axis: along which.

    Examples:
        >>> padded(torch.ones(2, 3), 2, 1)
        tensor([[1., 1., 1., 0.],
                [1., 1., 1., 0.]])
    """
    axis %= x.ndim
    missing = -x.shape[axis] % multiple
    if missing == 0:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [0, missing])


def join(view: Tensor, shape: torch.Size, granularity: Granularity, axis: int) -> Tensor:
    """What :func:`split` has split, without the zeros that it added.

    Args:
        view: of the form that :func:`split` gave.
        shape: of the tensor that was split.
        granularity: the same.
        axis: the same.

    Examples:
        >>> x = torch.randn(4, 70)
        >>> torch.equal(join(split(x, 32, -1)[0], x.shape, 32, -1), x)
        True
    """
    axis %= max(len(shape), 1)
    if isinstance(granularity, str):
        return view
    if isinstance(granularity, tuple):
        last = len(shape) - 1
        whole = view.flatten(last + 1, last + 2).flatten(last - 1, last)
        return whole[..., : shape[-2], : shape[-1]]
    return view.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])
