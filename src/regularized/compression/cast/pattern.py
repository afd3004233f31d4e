"""N:M patterns: of each M neighbouring weights along the inputs, N stay.

Groups lie along the last axis, the one that a linear layer sums over, as sparse tensor cores read them.
"""

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Pattern", "check_pattern", "follows_pattern", "semi_structured_mask"]

Pattern: TypeAlias = tuple[int, int]
"""(N, M): so many of so many stay."""

_NETWORK = 8  # up to this M, comparing all pairs beats sorting


def check_pattern(pattern: Pattern) -> None:
    """Refuse what is no pattern.

    Args:
        pattern: (N, M).

    Raises:
        ValueError: not two whole numbers with ``1 <= N < M``.

    Examples:
        >>> check_pattern((2, 4))
        >>> check_pattern((4, 4))
        Traceback (most recent call last):
        ...
        ValueError: pattern must be (N, M), two whole numbers with 1 <= N < M, got (4, 4); GPUs run (2, 4)
    """
    if not (
        isinstance(pattern, tuple | list)
        and len(pattern) == 2
        and all(isinstance(number, int) and not isinstance(number, bool) for number in pattern)
        and 1 <= pattern[0] < pattern[1]
    ):
        raise ValueError(f"pattern must be (N, M), two whole numbers with 1 <= N < M, got {pattern}; GPUs run (2, 4)")


def _groups(weight: Tensor, pattern: Pattern, name: str) -> Tensor:
    """(R, C / M, M) view; raises where the weight has no groups."""
    check_pattern(pattern)
    if weight.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; a pattern needs a matrix (outputs, inputs). A wrapper that "
            "flattens or shards weights separates them from their groups: use one that keeps them whole, such as DDP"
        )
    m = pattern[1]
    if weight.shape[1] % m:
        raise ValueError(
            f"{name} has {weight.shape[1]} inputs, which do not divide into groups of {m}; leave the layer out, or "
            "take another pattern"
        )
    groups: Tensor = weight.unflatten(1, (-1, m))
    return groups


@torch.no_grad()
def semi_structured_mask(weight: Tensor, pattern: Pattern = (2, 4), *, name: str = "the weight") -> Tensor:
    """Which weights are among the N largest in magnitude of their group of M.

    Args:
        weight: (R, C) outputs by inputs, C divisible by M. It must hold no NaN, which no order knows; whether it does
            is not looked at, since looking makes a GPU wait.
        pattern: (N, M); default (2, 4), the one that sparse tensor cores run.
        name: of the weight, for errors.

    Returns:
        (R, C) bool with exactly N True in each group; of equal ones the first stays. Where M is 8 at most it takes
        M (M - 1) / 2 comparisons of slices (6 for 2:4), otherwise one stable sort.

    Raises:
        ValueError: no pattern, not a matrix, or C not divisible by M.

    Examples:
        >>> semi_structured_mask(torch.tensor([[0.1, -3.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0]])).int()
        tensor([[0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    n, m = pattern
    sizes = _groups(weight, pattern, name).abs()
    if m > _NETWORK:
        order = sizes.argsort(stable=True, dim=-1, descending=True)
        kept = torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, order[..., :n], True)
        return kept.flatten(1)
    columns = [column.contiguous() for column in sizes.unbind(-1)]
    # How many of the group come first: of equal sizes the earlier does, so that j begins behind all j before it.
    before = [torch.full_like(column, j, dtype=torch.int8) for j, column in enumerate(columns)]
    for i in range(m):
        for j in range(i + 1, m):
            swapped = (columns[j] > columns[i]).view(torch.int8)
            before[i] += swapped
            before[j] -= swapped
    return torch.stack([count < n for count in before], dim=-1).flatten(1)


@torch.no_grad()
def follows_pattern(weight: Tensor, pattern: Pattern = (2, 4)) -> bool:
    """Whether no group of a weight has more than N entries that are not zero. Looks, so a GPU waits.

    Args:
        weight: (R, C).
        pattern: (N, M); default (2, 4).

    Returns:
        False as well for a tensor that has no such groups.

    Raises:
        ValueError: no pattern.

    Examples:
        >>> follows_pattern(torch.tensor([[0.0, 1.0, 2.0, 0.0]])), follows_pattern(torch.ones(1, 4))
        (True, False)
    """
    check_pattern(pattern)
    n, m = pattern
    if weight.ndim != 2 or weight.shape[1] % m:
        return False
    return bool((weight.unflatten(1, (-1, m)).count_nonzero(-1) <= n).all())
