"""The generalised Gaussian: density, moments, entropy, samples, and its fit to weights by two moments.

Symbols are in :mod:`regularized.compression.generalized_gaussian.penalty`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from regularized.mechanisms.ranges import check_fields, positive

__all__ = [
    "SHAPES",
    "GeneralizedGaussian",
    "WeightMoments",
    "moment_ratio",
    "moments_of",
    "ratio_table",
    "weight_moments",
]

SHAPES: tuple[float, ...] = tuple(k / 100 for k in range(10, 301))
"""The shapes that a fit can give: 0.10, 0.11, ..., 3.00, as in the official code."""


def moment_ratio(shape: float) -> float:
    """``rho = E[w^2] / E[|w|]^2`` of a generalised Gaussian: it tells the shape, and does not know the scale.

    Args:
        shape: nu, positive. The ratio falls with it: 2 for a Laplace distribution, pi / 2 for a Gaussian.

    Raises:
        ValueError: a shape that is not positive.

    Examples:
        >>> round(moment_ratio(1.0), 12), round(2 * moment_ratio(2.0) / math.pi, 12)
        (2.0, 1.0)
    """
    positive()("shape", shape)
    return math.exp(math.lgamma(1 / shape) + math.lgamma(3 / shape) - 2 * math.lgamma(2 / shape))


def ratio_table(device: torch.device | None = None) -> Tensor:
    """(291, 2) float64: every shape of :data:`SHAPES` and its :func:`moment_ratio`; what an estimate looks up.

    Args:
        device: where the weights are; default the CPU.
    """
    return torch.tensor([(shape, moment_ratio(shape)) for shape in SHAPES], dtype=torch.float64, device=device)


class WeightMoments(NamedTuple):
    """What two sums over all weights say of their distribution, as 0-d float64 tensors on the weights' device.

    Attributes:
        shape: nu of the generalised Gaussian with this ratio; the nearest of :data:`SHAPES`, in the ratio.
        std: root of the mean square; nothing is subtracted.
        ratio: mean square over squared mean magnitude, at least 1.

    Examples:
        >>> weight_moments([torch.tensor([3.0, -3.0])]).shape  # all of one size: flatter than the flattest shape
        tensor(3., dtype=torch.float64)
    """

    shape: Tensor
    std: Tensor
    ratio: Tensor


@torch.no_grad()
def weight_moments(weights: Iterable[Tensor], *, table: Tensor | None = None) -> WeightMoments:
    """Shape and spread of weights, all tensors together: two passes over them, and nothing is read by the host.

    Args:
        weights: of any shapes; half precision is summed in float32.
        table: :func:`ratio_table` on their device; default a new one, which a loop on a GPU should not make each step.

    Returns:
        The moments. The shape of weights that are all zero is 0.1, the first of the table, and means nothing.

    Raises:
        ValueError: there is no weight.

    Examples:
        >>> weights = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> moments = weight_moments([weights])
        >>> round(float(moments.shape), 1), round(float(moments.std), 1)
        (2.0, 1.0)
    """
    tensors = [w.detach() for w in weights if w.numel()]
    if not tensors:
        raise ValueError("there is no weight to look at")
    return moments_of(tensors, [w.abs().sum(dtype=_sum_type(w)) for w in tensors], table)


def moments_of(tensors: list[Tensor], sums: Sequence[Tensor], table: Tensor | None) -> WeightMoments:
    """:func:`weight_moments` where the sums of magnitudes are known.

    Args:
        tensors: the weights, detached.
        sums: of the magnitudes of each; not by torch's norm of order 1, which takes nine times as long on a processor.
        table: :func:`ratio_table` on their device; None makes one.
    """
    number = sum(w.numel() for w in tensors)
    squares = [norm.square() for norm in torch._foreach_norm(tensors, 2, dtype=_sum_type(tensors[0]))]
    first, second = (torch.stack([s.double() for s in parts]).sum() / number for parts in (sums, squares))
    ratio = second / first.square()
    known = ratio_table(tensors[0].device) if table is None else table
    nearest = (known[:, 1] - ratio).abs().argmin()  # of equally near ones the first
    # Not known[nearest, 0]: an index is read by the host.
    return WeightMoments(known[:, 0].gather(0, nearest.unsqueeze(0)).squeeze(0), second.sqrt(), ratio)


def _sum_type(weights: Tensor) -> torch.dtype:
    return torch.promote_types(weights.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class GeneralizedGaussian:
    """``f(w) = nu / (2 b Gamma(1 / nu)) exp(-(|w| / b)^nu)``, of mean zero.

    Args:
        shape: nu, positive: 1 is Laplace's distribution, 2 the Gaussian; the smaller, the heavier the tails.
        scale: b, positive, in the unit of the weights.

    Raises:
        ValueError: one of them is not positive.

    Examples:
        >>> laplace = GeneralizedGaussian(shape=1.0, scale=0.5)
        >>> round(laplace.variance, 6), round(laplace.entropy, 6)  # 2 b^2 and 1 + log(2 b)
        (0.5, 1.0)
    """

    shape: float
    scale: float

    def __post_init__(self) -> None:
        check_fields(self, shape=positive(), scale=positive())

    @classmethod
    def with_variance(cls, shape: float, variance: float) -> Self:
        """The one with this shape and variance.

        Args:
            shape: nu, positive.
            variance: positive.

        Examples:
            >>> round(GeneralizedGaussian.with_variance(2.0, 0.5).scale, 6)  # sqrt(2 variance)
            1.0
        """
        positive()("shape", shape)
        positive()("variance", variance)
        return cls(shape, math.sqrt(variance * math.exp(math.lgamma(1 / shape) - math.lgamma(3 / shape))))

    @classmethod
    def fit(cls, *weights: Tensor) -> Self:
        """The one whose first two absolute moments are nearest to those of the weights, all tensors together.

        The shape is one of :data:`SHAPES`: weights that are flatter than the flattest of them give 3.

        Args:
            weights: of any shapes.

        Raises:
            ValueError: there are none, all are zero, or one is not finite.

        Examples:
            >>> weights = GeneralizedGaussian(0.7, 0.1).sample((100_000,), generator=torch.Generator().manual_seed(0))
            >>> round(GeneralizedGaussian.fit(weights).shape, 1)
            0.7
        """
        moments = weight_moments(weights)
        std = float(moments.std)
        if not math.isfinite(std):
            raise ValueError("one of the weights is not finite (NaN or infinite)")
        if std == 0.0:
            raise ValueError("the weights are all zero, which no shape fits")
        return cls.with_variance(float(moments.shape), std * std)

    @property
    def variance(self) -> float:
        """``b^2 Gamma(3 / nu) / Gamma(1 / nu)``."""
        return self.scale**2 * math.exp(math.lgamma(3 / self.shape) - math.lgamma(1 / self.shape))

    @property
    def kurtosis(self) -> float:
        """``Gamma(5 / nu) Gamma(1 / nu) / Gamma(3 / nu)^2``: 3 for the Gaussian, 6 for Laplace's distribution."""
        inverse = 1 / self.shape
        return math.exp(math.lgamma(5 * inverse) + math.lgamma(inverse) - 2 * math.lgamma(3 * inverse))

    @property
    def entropy(self) -> float:
        """Differential entropy in nats, ``1 / nu + log(2 b Gamma(1 / nu) / nu)``."""
        return 1 / self.shape + math.log(2 * self.scale / self.shape) + math.lgamma(1 / self.shape)

    def log_density(self, w: Tensor) -> Tensor:
        """Logarithm of the density, elementwise.

        Args:
            w: any shape.
        """
        constant = math.log(self.shape / (2 * self.scale)) - math.lgamma(1 / self.shape)
        return constant - (w.abs() / self.scale).pow(self.shape)

    def sample(
        self,
        size: tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """Independent weights: a sign times ``b g^(1 / nu)``, with g from a Gamma distribution of shape ``1 / nu``.

        Args:
            size: shape of the result.
            generator: where the randomness comes from, on the device; default torch's own.
            dtype: of the result; it is drawn in float64, so that few small g vanish.
            device: of the result; default the CPU.

        Examples:
            >>> GeneralizedGaussian(2.0, 1.0).sample((3, 2)).shape
            torch.Size([3, 2])
        """
        concentration = torch.full(size, 1 / self.shape, dtype=torch.float64, device=device)
        magnitude = torch._standard_gamma(concentration, generator=generator).pow_(1 / self.shape).mul_(self.scale)
        sign = torch.empty(size, dtype=torch.float64, device=device).bernoulli_(0.5, generator=generator)
        return magnitude.mul_(sign.mul_(2).sub_(1)).to(dtype)
