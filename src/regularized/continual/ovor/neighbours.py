"""How lonely a point is: squared distance to its K-th nearest neighbour, exact, in torch alone.

All points that are searched have length 1. Then the K-th smallest distance of a query q is that of the K-th *largest*
inner product, ``d^2 = |q|^2 + 1 - 2 <q, x>``, and products are what processors are good at.

Candidates are all sums of a base point and a noise, ``q_be = h_b + sigma eps_e``. Their products with a point are sums
of products, ``<h_b, x> + sigma <eps_e, x>``; so ``b`` bases and ``e`` noises cost the products of ``b + e`` queries,
and not of ``b e``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from regularized.mechanisms.ranges import between

__all__ = ["kth_squared_distance", "lonely_sums", "unit"]

_NUMBERS = 2**22  # products that are held at once


def unit(points: Tensor) -> Tensor:
    """Points at length 1; float32 at least, so that half precision does not decide who is near.

    Examples:
        >>> unit(torch.tensor([[3.0, 4.0]])).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    return F.normalize(points.to(torch.promote_types(points.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def kth_squared_distance(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Squared distance to the K-th nearest of some points.

    Args:
        queries: (Q, d).
        points: (n, d), of length 1, see :func:`unit`.
        k: 1 for the nearest; a query that is one of the points is its own nearest.

    Returns:
        (Q,) float32 at least.

    Raises:
        ValueError: there are fewer than ``k`` points.

    Examples:
        >>> corners = torch.eye(3)
        >>> kth_squared_distance(corners, corners, 1).tolist(), kth_squared_distance(corners, corners, 2).tolist()
        ([0.0, 0.0, 0.0], [2.0, 2.0, 2.0])
    """
    _check(k, points)
    queries = queries.to(points.dtype)
    parts = [_kth_largest(part @ points.T, k) for part in queries.split(_rows(points))]
    return _distance(queries.square().sum(dim=1), torch.cat(parts))


@torch.no_grad()
def lonely_sums(bases: Tensor, noises: Tensor, points: Tensor, k: int, *, normalise: bool) -> Tensor:
    """K-th squared distances of all sums of a base and a noise.

    Args:
        bases: (b, d).
        noises: (e, d), already scaled.
        points: (n, d), of length 1.
        k: which neighbour.
        normalise: bring the sums to length 1 before they are compared.

    Returns:
        (b, e).

    Raises:
        ValueError: there are fewer than ``k`` points.

    Examples:
        >>> lonely_sums(torch.zeros(1, 2), torch.eye(2), torch.eye(2), 2, normalise=False).tolist()
        [[2.0, 2.0]]
    """
    _check(k, points)
    bases, noises = bases.to(points.dtype), noises.to(points.dtype)
    squares = bases.square().sum(1)[:, None] + 2.0 * bases @ noises.T + noises.square().sum(1)
    of_bases = bases @ points.T
    columns = []
    for part in noises.split(_rows(points)):
        of_noises = part @ points.T
        columns.append(torch.stack([_kth_largest(of_noises + row, k) for row in of_bases]))
    nearest = torch.cat(columns, dim=1)
    if normalise:
        lengths = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return _distance(torch.ones_like(squares), nearest / lengths)
    return _distance(squares, nearest)


def _distance(squares: Tensor, products: Tensor) -> Tensor:
    return (squares + 1.0 - 2.0 * products).clamp_min(0.0)


def _kth_largest(products: Tensor, k: int) -> Tensor:
    return products.topk(k, dim=1, sorted=False).values.amin(dim=1)


def _rows(points: Tensor) -> int:
    return max(1, _NUMBERS // len(points))


def _check(k: int, points: Tensor) -> None:
    between(1, len(points), remedy=f"there are {len(points)} points to search", whole=True)("k", k)
