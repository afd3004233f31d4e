"""Images as patches, tokens that are hidden, and tokens that are taken: what masked training is made of.

Patches are numbered in raster order, row by row. Which tokens are hidden is a :class:`Split`, two tables of positions
with the same number of entries in each row, so that what is visible forms a batch::

    split = random_split(len(images), 16, hidden=12, device=images.device)
    seen = take(tokens, split.visible)      # (B, 4, D)

Nothing here waits for the device but :func:`split_of`, which looks at a mask that somebody else made.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, between, count

__all__ = [
    "Split",
    "hide_highest",
    "join",
    "join_vectors",
    "patch_grid",
    "patch_vectors",
    "patchify",
    "random_split",
    "split_of",
    "take",
]

# Shapes: B images, N patches or tokens of each (rows times columns of the grid), C channels, P the side of a patch, V
# visible and M hidden tokens, V + M = N.


# -- patches ------------------------------------------------------------------------------------


@allowed(size=count(1, "pixels of a side"))
def patch_grid(height: int, width: int, size: int) -> tuple[int, int]:
    """Rows and columns of patches of ``size`` x ``size`` pixels.

    Raises:
        ValueError: a side is no multiple of the patch.

    Examples:
        >>> patch_grid(32, 48, 8)
        (4, 6)
    """
    if height < 1 or width < 1 or height % size or width % size:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into patches of {size} x {size}: both sides must be "
            f"multiples of {size}; pad or resize the images, or take another patch size"
        )
    return height // size, width // size


def patchify(images: Tensor, size: int) -> Tensor:
    """Cut images into patches that are small images.

    Args:
        images: (B, C, H, W).
        size: P.

    Returns:
        (B, N, C, P, P), contiguous, in raster order.

    Raises:
        ValueError: ``images`` is not 4-D, or a side is no multiple of ``size``.

    Examples:
        >>> patches = patchify(torch.arange(16.0).view(1, 1, 4, 4), 2)
        >>> patches.shape, patches[0, 1].flatten().tolist()
        (torch.Size([1, 4, 1, 2, 2]), [2.0, 3.0, 6.0, 7.0])
    """
    return _cut(images, size).permute(0, 2, 4, 1, 3, 5).flatten(1, 2).contiguous()


def patch_vectors(images: Tensor, size: int) -> Tensor:
    """Cut images into patches that are vectors of row, column and channel, the channel fastest: what an MAE predicts.

    Args:
        images: (B, C, H, W).
        size: P.

    Returns:
        (B, N, P P C), contiguous, in raster order.

    Raises:
        ValueError: as :func:`patchify`.

    Examples:
        >>> patch_vectors(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None], 2).tolist()
        [[[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]]]
    """
    return _cut(images, size).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2).contiguous()


def join(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The images that :func:`patchify` cut.

    Args:
        patches: (B, N, C, P, P).
        grid: rows and columns.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the grid has another number of patches.

    Examples:
        >>> images = torch.randn(2, 3, 4, 6)
        >>> torch.equal(join(patchify(images, 2), (2, 3)), images)
        True
    """
    rows, columns = _checked_grid(patches, grid)
    b, _, c, p, q = patches.shape
    return patches.view(b, rows, columns, c, p, q).permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * p, columns * q)


def join_vectors(vectors: Tensor, grid: tuple[int, int], *, channels: int) -> Tensor:
    """The images that :func:`patch_vectors` cut.

    Args:
        vectors: (B, N, P P C).
        grid: rows and columns.
        channels: C.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: the grid has another number of patches, or the length of a vector is not C times a square.

    Examples:
        >>> images = torch.randn(2, 3, 4, 6)
        >>> torch.equal(join_vectors(patch_vectors(images, 2), (2, 3), channels=3), images)
        True
    """
    _checked_grid(vectors, grid)
    length = vectors.shape[2]
    size = int((length // channels) ** 0.5 + 0.5)
    if size * size * channels != length:
        raise ValueError(f"vectors of length {length} are no square patches of {channels} channels")
    return join(vectors.unflatten(2, (size, size, channels)).permute(0, 1, 4, 2, 3), grid)


def _cut(images: Tensor, size: int) -> Tensor:
    """(B, C, rows, P, columns, P), a view where the images allow it."""
    if images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    rows, columns = patch_grid(images.shape[2], images.shape[3], size)
    cut: Tensor = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))
    return cut


def _checked_grid(patches: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    if patches.ndim < 3 or patches.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, got {tuple(patches.shape)}")
    return grid


# -- tokens that are hidden ---------------------------------------------------------------------


class Split(NamedTuple):
    """Which tokens are visible and which are hidden, as positions; both in raster order.

    Examples:
        >>> Split(torch.tensor([[1, 2]]), torch.tensor([[0, 3]])).mask.tolist()
        [[True, False, False, True]]
    """

    visible: Tensor
    """(B, V) int64."""
    hidden: Tensor
    """(B, M) int64."""

    @property
    def mask(self) -> Tensor:
        """(B, N) bool, True where a token is hidden."""
        size = (self.hidden.shape[0], self.visible.shape[1] + self.hidden.shape[1])
        return torch.zeros(size, dtype=torch.bool, device=self.hidden.device).scatter_(1, self.hidden, True)


def hide_highest(priority: Tensor, hidden: int) -> Split:
    """Hide in each row the tokens of the highest priority.

    Args:
        priority: (B, N) real numbers without NaN. Of equal ones any may be hidden, and always exactly ``hidden``.
        hidden: M, from 0 to N.

    Raises:
        ValueError: ``hidden`` is outside, or ``priority`` is not 2-D.

    Examples:
        >>> split = hide_highest(torch.tensor([[0.1, 0.9, 0.3, 0.7]]), 2)
        >>> split.visible.tolist(), split.hidden.tolist()
        ([[0, 2]], [[1, 3]])
    """
    if priority.ndim != 2:
        raise ValueError(f"priority must have shape (B, N), got {tuple(priority.shape)}")
    tokens = priority.shape[1]
    between(0, tokens, meaning=f"of {tokens} tokens", whole=True)("hidden", hidden)
    order = priority.argsort(dim=1)
    visible, highest = order.split([tokens - hidden, hidden], dim=1)
    return Split(visible.sort(dim=1).values, highest.sort(dim=1).values)


def random_split(
    batch: int,
    tokens: int,
    hidden: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Split:
    """Hide the same number of tokens in each row, uniformly at random and without replacement.

    Args:
        batch: B.
        tokens: N.
        hidden: M, from 0 to N.
        generator: on ``device``; None is the device's global one.
        device: where the positions are needed.

    Raises:
        ValueError: ``hidden`` is outside.

    Examples:
        >>> split = random_split(2, 16, hidden=12)
        >>> split.visible.shape, split.mask.sum(dim=1).tolist()
        (torch.Size([2, 4]), [12, 12])
    """
    return hide_highest(torch.rand(batch, tokens, generator=generator, device=device), hidden)


def split_of(mask: Tensor) -> Split:
    """The split of a mask that was made elsewhere.

    Args:
        mask: (B, N) bool, True where a token is hidden; the same number in each row. This is read from the device.

    Raises:
        ValueError: rows hide different numbers of tokens, or the mask is no 2-D bool tensor.

    Examples:
        >>> split_of(torch.tensor([[True, False, False, True]])).visible.tolist()
        [[1, 2]]
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"a mask must be a bool tensor (B, N), got {mask.dtype} of shape {tuple(mask.shape)}")
    counts = mask.sum(dim=1).tolist()
    hidden = counts[0] if counts else 0
    for row, number in enumerate(counts):
        if number != hidden:
            raise ValueError(
                f"each row of a mask must hide the same number of tokens, or what is visible is no batch: row 0 hides "
                f"{hidden}, row {row} hides {number}; hide_highest and random_split make such masks"
            )
    return hide_highest(mask.to(torch.uint8), hidden)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at given positions of each row.

    Args:
        tokens: (B, N, ...), or (1, N, ...) for what is the same in each row.
        index: (B, K) int64.

    Returns:
        (B, K, ...).

    Raises:
        ValueError: shapes do not fit.

    Examples:
        >>> take(torch.tensor([[10, 11, 12], [20, 21, 22]]), torch.tensor([[2], [0]])).tolist()
        [[12], [20]]
    """
    if tokens.ndim < 2 or index.ndim != 2 or tokens.shape[0] not in (1, index.shape[0]):
        raise ValueError(
            f"index must be (B, K) for tokens (B, N, ...), got {tuple(index.shape)} and {tuple(tokens.shape)}"
        )
    trailing = tokens.shape[2:]
    where = index.view(*index.shape, *(1 for _ in trailing)).expand(*index.shape, *trailing)
    return tokens.expand(index.shape[0], *tokens.shape[1:]).gather(1, where)
