"""Pre-training under infinite compute (Kim et al. 2025, arXiv 2509.14786): the power law by which recipes are compared.

==========  =============================================================  ===============================
paper       meaning                                                        here
==========  =============================================================  ===============================
D           tokens of the fixed corpus                                     ``data``, repeated
E           epochs: how often each sample is seen                          ``epochs``
N, K        parameters of a model; members of an ensemble                  ``x`` of a law
L           validation loss, nats a token                                  ``y`` of a law
A, B, C     ``L(x) = A / x^B + C``; C is the asymptote                     :class:`PowerLaw`
w           share of the steps that a student spends on teacher's text     ``teacher_weight``
==========  =============================================================  ===============================

A recipe says how epochs, rate and decay follow from size and data. With compute unlimited it is worth where it ends,
not what one run reaches: of a law in N, or in K, that is C; of both together, ``lim_N lim_K``.

The fit is the least squares of three numbers that are not negative. For a given B the law is linear in A and C, whose
best values have a closed form; what is left is a search along one line, which needs no start and misses no valley.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PowerLaw", "data_efficiency", "least_squares"]

_SMALLEST, _LARGEST, _POINTS = 1e-3, 64.0, 512  # of the exponent: flat within rounding below, a single jump above


class PowerLaw(NamedTuple):
    """The curve ``A / x^B + C``.

    Attributes:
        A: the height above the asymptote at x = 1.
        B: the exponent.
        C: the asymptote.

    Raises:
        ValueError: from :meth:`fit`, of points that have no law; from :meth:`solve`, of a loss that it never reaches.

    Examples:
        >>> law = PowerLaw(0.05, 1.02, 3.43)  # the paper's, of one regularized model; x in billions of parameters
        >>> round(law(0.3), 3), law.asymptote
        (3.601, 3.43)
        >>> round(law.solve(3.5), 3)  # billions of parameters that reach 3.5 nats
        0.719
    """

    A: float
    B: float
    C: float

    @classmethod
    def fit(cls, x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> "PowerLaw":
        """The law of a curve that falls.

        Args:
            x: three or more different sizes, positive, in any unit and order.
            y: their losses.

        Raises:
            ValueError: fewer than three points, a size twice, a number that is not positive or finite, or a curve that
                rises somewhere, which has no asymptote to be read off.

        Examples:
            >>> law = PowerLaw.fit([1, 2, 4, 8], [3.0, 2.5, 2.25, 2.125])
            >>> [round(number, 6) for number in law]
            [1.0, 1.0, 2.0]
        """
        sizes, losses = _points(x, y)
        order = sizes.argsort()
        steps = losses[order].diff()
        if bool((steps >= 0).any()):
            at = int((steps >= 0).nonzero()[0])
            first, second = order[at : at + 2].tolist()
            raise ValueError(
                f"the losses do not fall with size: {losses[first]:.6g} at {sizes[first]:.6g}, {losses[second]:.6g} at "
                f"{sizes[second]:.6g}, so there is no asymptote; tune the regularization of each size first, or "
                "average over seeds"
            )
        return least_squares(sizes, losses)

    @property
    def asymptote(self) -> float:
        """The loss at infinite x."""
        return self.C

    def __call__(self, x: float) -> float:
        """The loss at a size."""
        return float(self.A / x**self.B + self.C)

    def solve(self, loss: float) -> float:
        """The size that reaches a loss.

        Raises:
            ValueError: no size does: the loss is not above the asymptote, or the law is flat.
        """
        if not loss > self.C or self.A <= 0 or self.B <= 0:
            raise ValueError(
                f"no size reaches a loss of {loss:.6g}: the law ends at C={self.C:.6g} (A={self.A:.3g}, "
                f"B={self.B:.3g}); ask for a loss above the asymptote"
            )
        return float((self.A / (loss - self.C)) ** (1 / self.B))


def least_squares(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> PowerLaw:
    """The best A, B, C >= 0 for any points, falling or not; :meth:`PowerLaw.fit` asks first whether they fall.

    Args:
        x: (n,) sizes, positive, three different ones or more.
        y: (n,) losses.

    Raises:
        ValueError: fewer than three points, a size twice, or a number that is not positive or finite.

    Examples:
        >>> least_squares([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).C
        2.0
    """
    sizes, losses = _points(x, y)
    unit = sizes.log().mean().exp()  # where powers neither vanish nor overflow
    logs = (sizes / unit).log()
    exponents = torch.logspace(math.log10(_SMALLEST), math.log10(_LARGEST), _POINTS, dtype=torch.float64)
    best = int(_rest(exponents, logs, losses).argmin())
    low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, _POINTS - 1)]
    for _ in range(8):  # each round leaves a 16th of the bracket
        inside = torch.linspace(0.0, 1.0, 33, dtype=torch.float64) * (high - low) + low
        best = int(_rest(inside, logs, losses).argmin())
        low, high = inside[max(best - 1, 0)], inside[min(best + 1, 32)]
    exponent = _polished(inside[best], logs, losses)
    height, asymptote = (float(value[0]) for value in _linear(exponent[None], logs, losses))
    b = float(exponent)
    return PowerLaw(height * float(unit) ** b, b, asymptote)


def data_efficiency(baseline: PowerLaw, loss: float, data: float) -> float:
    """How many times as much data the baseline needs for a loss that a method reached with ``data``.

    Args:
        baseline: the law of the baseline's loss over D.
        loss: what the method reached.
        data: the D that it had, in the law's unit.

    Raises:
        ValueError: the baseline never reaches it.

    Examples:
        >>> data_efficiency(PowerLaw(1.0, 0.5, 2.0), 2.5, data=1.0)
        4.0
    """
    return baseline.solve(loss) / data


def _points(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> tuple[Tensor, Tensor]:
    sizes, losses = (torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().flatten() for values in (x, y))
    if len(sizes) != len(losses) or len(sizes) < 3:
        raise ValueError(
            f"a law of three numbers needs three points or more, one loss for each size; got {len(sizes)} sizes and "
            f"{len(losses)} losses"
        )
    if not bool(sizes.isfinite().all() & (sizes > 0).all() & losses.isfinite().all()):
        raise ValueError(
            f"sizes must be positive and finite, losses finite; got {sizes.tolist()} and {losses.tolist()}"
        )
    if len(sizes.unique()) < len(sizes):
        raise ValueError(f"each size may occur once, got {sizes.tolist()}; average the losses of runs of one size")
    return sizes, losses


def _linear(exponents: Tensor, logs: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Best A, C >= 0 for each exponent (m,); at an edge the other number is the best alone."""
    powers = torch.exp(-exponents[:, None] * logs)
    spread = powers - powers.mean(dim=1, keepdim=True)
    slope = (spread @ losses) / spread.square().sum(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    height = slope.clamp_min(0.0)
    asymptote = losses.mean() - height * powers.mean(dim=1)
    alone = ((powers @ losses) / powers.square().sum(dim=1)).clamp_min(0.0)
    below = asymptote < 0
    return torch.where(below, alone, height), asymptote.clamp_min(0.0)


def _rest(exponents: Tensor, logs: Tensor, losses: Tensor) -> Tensor:
    """Sum of squares that is left, for each exponent (m,)."""
    height, asymptote = _linear(exponents, logs, losses)
    curve = height[:, None] * torch.exp(-exponents[:, None] * logs) + asymptote[:, None]
    return (curve - losses).square().sum(dim=1)


def _polished(exponent: Tensor, logs: Tensor, losses: Tensor) -> Tensor:
    """A few Gauss-Newton steps: comparing sums of squares finds a minimum to half the digits only."""
    for _ in range(4):
        height, asymptote = (value[0] for value in _linear(exponent[None], logs, losses))
        powers = torch.exp(-exponent * logs)
        columns = [powers, -height * logs * powers] + ([torch.ones_like(powers)] if asymptote > 0 else [])
        step = torch.linalg.lstsq(torch.stack(columns, dim=1), losses - height * powers - asymptote).solution[1]
        new = exponent + step
        if not bool(new > 0) or bool((new - exponent).abs() > 1e-3 * exponent):
            break
        exponent = new
    return exponent
