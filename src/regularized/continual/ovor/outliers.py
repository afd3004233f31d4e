"""Outliers near the edge of a cloud of features, made anew for each epoch of the second phase (NPOS).

1. Boundary points: the features whose K-th neighbour is farthest, at length 1.
2. Candidates: each boundary point plus each of some noises, the same noises for every point.
3. Outliers: the candidates whose K-th neighbour among the features is farthest.

Paper and released code differ (commit 4f59b75): the code computes the boundary points and then leaves them out, so its
candidates are noise around the *origin*; and since it repeats the noises once for each boundary point, what it keeps
are ``select`` copies of each of a few vectors. Which of the two made the published numbers is not known.
:class:`OutlierSampler` does what the paper says, and with ``around="origin"`` what the code does: there the distinct
noises are searched once, and copied afterwards.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.continual.ovor.neighbours import kth_squared_distance, lonely_sums, unit
from regularized.mechanisms.ranges import Choice, check_fields, count, positive

__all__ = ["Around", "OutlierSampler", "boundary_outliers", "boundary_points", "official_outliers"]

Around: TypeAlias = Literal["boundary", "origin"]
"""Where candidates lie: around boundary points (the paper), or around the origin (the released code)."""


def boundary_points(features: Tensor, *, k: int, select: int) -> Tensor:
    """Which features lie at the edge: rows of the ``select`` farthest K-th neighbours, the farthest first.

    Args:
        features: (n, d), compared at length 1.
        k: which neighbour, the point itself counted: 50 is the 49th other.
        select: how many; all of them where there are fewer.

    Returns:
        (min(select, n),) int64.

    Examples:
        >>> boundary_points(torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]), k=2, select=1).tolist()
        [2]
    """
    points = unit(features)
    return kth_squared_distance(points, points, k).topk(min(select, len(points))).indices


def boundary_outliers(
    features: Tensor, boundary: Tensor, noises: Tensor, *, k: int, keep: int, normalise: bool = True
) -> Tensor:
    """The loneliest sums of a boundary point and a noise.

    Args:
        features: (n, d).
        boundary: (b,) rows of them.
        noises: (e, d), already scaled.
        k: which neighbour.
        keep: how many; all b e where there are fewer.
        normalise: compare candidates at length 1, as NPOS does (default). False compares them as they are with features
            of length 1, as the released code would.

    Returns:
        (keep, d), the loneliest first; in the scale of the features.

    Examples:
        >>> boundary_outliers(torch.eye(2), torch.tensor([0]), torch.tensor([[0.0, 1.0], [0.0, -1.0]]), k=2, keep=1)
        tensor([[ 1., -1.]])
    """
    bases = features[boundary]
    distances = lonely_sums(bases, noises, unit(features), k, normalise=normalise)
    kept = distances.flatten().topk(min(keep, distances.numel())).indices
    return bases[kept // len(noises)] + noises[kept % len(noises)].to(bases.dtype)


def official_outliers(features: Tensor, noises: Tensor, *, k: int, select: int, keep: int) -> Tensor:
    """What the released code keeps: the loneliest noises around the origin, each ``select`` times.

    Args:
        features: (n, d).
        noises: (e, d), already scaled.
        k: which neighbour.
        select: boundary points, which decide nothing here but the number of copies.
        keep: how many, copies counted.

    Returns:
        (min(keep, e select), d), of which ceil(keep / select) differ.

    Examples:
        >>> official_outliers(torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), k=1, select=2, keep=3)
        tensor([[2., 0.],
                [2., 0.],
                [0., 1.]])
    """
    distances = kth_squared_distance(noises, unit(features), k)
    copies = min(select, len(features))
    distinct = distances.topk(min(-(-keep // copies), len(noises))).indices
    return noises[distinct].repeat_interleave(copies, dim=0)[:keep].to(features.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierSampler:
    """Draws the outliers of an epoch; the defaults are those of the released code.

    Args:
        around: see :data:`Around`; default ``"boundary"``, the paper.
        sigma: standard deviation of the noise, in the scale of the features; default 0.1. A port of the code uses 1.
        k: K, which neighbour measures loneliness; default 50.
        select: boundary points; default 50.
        noises: noises drawn; default 600.
        per_class: outliers for each class of the task; default 40.

    Raises:
        ValueError: an option is outside its range.

    Examples:
        >>> sampler = OutlierSampler(k=5, select=4, noises=20, per_class=6)
        >>> features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> sampler.draw(features, num_classes=2, generator=torch.Generator().manual_seed(1)).shape
        torch.Size([12, 3])
    """

    around: Around = "boundary"
    sigma: float = 0.1
    k: int = 50
    select: int = 50
    noises: int = 600
    per_class: int = 40

    def __post_init__(self) -> None:
        check_fields(
            self,
            around=Choice("boundary", "origin"),
            sigma=positive("in the scale of the features"),
            **dict.fromkeys(("k", "select", "noises", "per_class"), count(1)),
        )

    @torch.no_grad()
    def draw(self, features: Tensor, *, num_classes: int, generator: torch.Generator | None = None) -> Tensor:
        """Outliers of a task.

        Args:
            features: (n, d) of the task's training samples.
            num_classes: classes of the task.
            generator: of the noise, on the CPU; default the global one.

        Returns:
            (per_class num_classes, d), or all candidates where there are fewer; in the features' dtype and device.

        Raises:
            ValueError: there are not more features than ``k``.
        """
        if self.k >= len(features):
            raise ValueError(
                f"k must be below the number of features of the task, or every point is as lonely as the farthest "
                f"pair; got k={self.k} and {len(features)} features: lower k, or give more samples"
            )
        noises = self.sigma * torch.randn(self.noises, features.shape[1], generator=generator)
        noises = noises.to(features.device)
        keep = self.per_class * num_classes
        if self.around == "origin":
            return official_outliers(features, noises, k=self.k, select=self.select, keep=keep)
        boundary = boundary_points(features, k=self.k, select=self.select)
        return boundary_outliers(features, boundary, noises, k=self.k, keep=keep)
