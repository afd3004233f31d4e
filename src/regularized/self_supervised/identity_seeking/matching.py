"""The best one-to-one matching between the crops of two frames."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Solver", "max_weight_matching"]

Solver: TypeAlias = Callable[[Any], tuple[Any, Any]]
"""From a matrix of costs (nested lists) to rows and columns of the cheapest assignment of ``min(n, m)`` pairs, such as
``scipy.optimize.linear_sum_assignment``."""

_MANY = 2000


def max_weight_matching(
    similarity: Tensor, *, min_similarity: float | None = None, solver: Solver | None = None
) -> Tensor:
    """Pairs of rows and columns, each used at most once, whose similarities have the largest sum.

    Args:
        similarity: (n, m) similarities; no gradient goes through.
        min_similarity: pairs that add no more than this are left out: with 0 it is the matching of maximum weight in
            the strict sense. Default None: all ``min(n, m)`` pairs.
        solver: of the assignment. Default None: the Hungarian algorithm in plain Python, quick enough for some thirty
            crops a frame; ``scipy.optimize.linear_sum_assignment`` for more.

    Returns:
        (k, 2) pairs, sorted by row.

    Raises:
        ValueError: it is no matrix, or holds values that are not finite.

    Warns:
        UserWarning: there are more than 2000 crops: the work grows with the third power.

    Examples:
        The best partner of both rows is the first column; together they earn more otherwise:

        >>> max_weight_matching(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
        tensor([[0, 1],
                [1, 0]])
    """
    if similarity.dim() != 2:
        raise ValueError(f"similarities are (crops of one frame, crops of the other), got {tuple(similarity.shape)}")
    if not bool(similarity.isfinite().all()):
        raise ValueError("similarities must be finite; are there NaN in the features?")
    if max(similarity.shape) > _MANY:
        warnings.warn(
            f"{max(similarity.shape)} crops in a frame: the work of matching grows with the third power; take fewer "
            "crops, or split the frame",
            stacklevel=2,
        )
    weights = similarity.detach().double().cpu()
    if min_similarity is not None:
        weights = (weights - min_similarity).clamp(min=0.0)
    rows, columns = (solver or _hungarian)((-weights).tolist()) if weights.numel() else ([], [])
    pairs = torch.tensor([[int(i), int(j)] for i, j in zip(rows, columns, strict=True)], dtype=torch.long).view(-1, 2)
    if min_similarity is not None:
        pairs = pairs[weights[pairs[:, 0], pairs[:, 1]] > 0]
    return pairs[pairs[:, 0].argsort()].to(similarity.device)


def _hungarian(cost: Sequence[Sequence[float]]) -> tuple[list[int], list[int]]:
    """Shortest augmenting paths with potentials, one for each row: O(n^2 m) for n <= m."""
    if len(cost) > len(cost[0]):
        columns, rows = _hungarian(list(zip(*cost, strict=True)))
        return rows, columns
    n, m = len(cost), len(cost[0])
    row_price, column_price = [0.0] * n, [0.0] * (m + 1)
    owner = [-1] * (m + 1)  # the row that has a column; the last column is where a search begins
    for row in range(n):
        owner[m], here = row, m
        distance, before, done = [math.inf] * m, [m] * m, [False] * (m + 1)
        while owner[here] >= 0:
            done[here] = True
            current, costs = owner[here], cost[owner[here]]
            nearest, step = -1, math.inf
            for column in range(m):
                if done[column]:
                    continue
                reduced = costs[column] - row_price[current] - column_price[column]
                if reduced < distance[column]:
                    distance[column], before[column] = reduced, here
                if distance[column] < step:
                    step, nearest = distance[column], column
            for column in range(m):
                if done[column]:
                    row_price[owner[column]] += step
                    column_price[column] -= step
                else:
                    distance[column] -= step
            row_price[row] += step
            here = nearest
        while here != m:  # pass the columns on along the path
            owner[here] = owner[before[here]]
            here = before[here]
    pairs = sorted((owner[column], column) for column in range(m) if owner[column] >= 0)
    return [row for row, _ in pairs], [column for _, column in pairs]
