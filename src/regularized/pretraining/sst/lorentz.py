"""The linear layer of hyperbolic networks (HyboNet), whose linear part is an ordinary one: SST converts that.

Hyperbolic space of curvature -1 is the upper sheet of a hyperboloid, the points x with ``<x, x> = -1`` and ``x_0 > 0``
under the Lorentz product ``<x, y> = -x_0 y_0 + x_1 y_1 + ... + x_d y_d``. The first coordinate of a point is its time.

    Chen et al., "Fully Hyperbolic Neural Networks", ACL 2022, arXiv 2105.14686; their code, which SST's paper uses too.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from regularized.mechanisms.ranges import allowed, between, count, positive

__all__ = ["LorentzLinear", "lorentz_centroid", "lorentz_lift", "lorentz_product"]


def lorentz_product(x: Tensor, y: Tensor) -> Tensor:
    """``<x, y> = -x_0 y_0 + x_1 y_1 + ...`` over the last dimension; ``-cosh`` of the distance of two points.

    Args:
        x: (..., d + 1).
        y: (..., d + 1), to broadcast.

    Returns:
        (...).

    Examples:
        >>> point = lorentz_lift(torch.tensor([3.0, 4.0]))
        >>> round(lorentz_product(point, point).item(), 4)
        -1.0
    """
    product = x * y
    return product[..., 1:].sum(-1) - product[..., 0]


def lorentz_lift(space: Tensor) -> Tensor:
    """The point above some coordinates of space: its time is ``sqrt(1 + |space|^2)``.

    Args:
        space: (..., d).

    Returns:
        (..., d + 1).

    Examples:
        >>> lorentz_lift(torch.zeros(2))
        tensor([1., 0., 0.])
    """
    return torch.cat([(1.0 + space.square().sum(-1, keepdim=True)).sqrt(), space], dim=-1)


def lorentz_centroid(points: Tensor, weights: Tensor) -> Tensor:
    """Weighted means of points, back on the hyperboloid: how a hyperbolic graph network gathers neighbours.

    Args:
        points: (n, d + 1) on the hyperboloid.
        weights: (k, n), >= 0, a row for each mean and no row of zeros: an adjacency matrix with loops, say.

    Returns:
        (k, d + 1).

    Examples:
        >>> points = lorentz_lift(torch.tensor([[1.0], [-1.0]]))
        >>> lorentz_centroid(points, torch.ones(1, 2))
        tensor([[1., 0.]])
    """
    means = weights @ points
    return means / (-lorentz_product(means, means)).clamp(min=1e-8).sqrt()[..., None]


class LorentzLinear(nn.Module):
    """From points of one hyperbolic space to points of another, by a linear map of all their coordinates.

    With ``z = W x + b``, the new time is ``1.1 + scale * sigmoid(z_0)``, and the new space is ``z_1, z_2, ...``, made
    as long as the time wants it. The linear map is ``self.linear``, a plain layer, and thereby a target of
    :class:`~regularized.pretraining.sst.SST`.

    Args:
        in_features: coordinates of a point, its time among them.
        out_features: likewise, at least 2.
        bias: whether the map has one; default True.
        activation: applied to all coordinates before the map (the authors'), such as ``torch.relu``; default none.
        dropout: of the coordinates, likewise; default 0 (the authors: 0.1 for translation).
        scale: largest time above 1.1 at the start; it is learned. Default 10 (the authors' graph networks).

    Raises:
        ValueError: an option is outside its range.

    Examples:
        >>> layer = LorentzLinear(4, 3)
        >>> y = layer(lorentz_lift(torch.randn(5, 3)))
        >>> torch.allclose(lorentz_product(y, y), -torch.ones(5), atol=1e-3)
        True
    """

    @allowed(in_features=count(2), out_features=count(2), dropout=between(0.0, 1.0, "[)"), scale=positive())
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.0,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.linear: nn.Module = nn.Linear(in_features, out_features, bias=bias)
        self.activation = activation
        self.dropout: nn.Dropout = nn.Dropout(dropout)
        self.log_scale: nn.Parameter = nn.Parameter(torch.tensor(math.log(scale)))
        with torch.no_grad():  # as the authors: the time of the input has no weight at the start
            bound = out_features**-0.5
            weight = nn.init.uniform_(self.linear.weight, -bound, bound)
            weight[:, 0] = 0.0
            if bias:
                nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) on the hyperboloid to (..., out_features) on the hyperboloid."""
        if self.activation is not None:
            x = self.activation(x)
        z = self.linear(self.dropout(x))
        time = 1.1 + self.log_scale.exp() * z[..., :1].sigmoid()
        space = z[..., 1:]
        length = space.square().sum(-1, keepdim=True).clamp(min=1e-8)
        return torch.cat([time, space * ((time.square() - 1.0) / length).sqrt()], dim=-1)
