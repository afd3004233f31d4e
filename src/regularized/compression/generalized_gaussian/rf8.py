"""RF8, the "residual float": a sign, a power of two, and one more power of two that is added or subtracted.

**Rounding.** ``e1 = round(log2 |w|)``; the residual ``d = |w| - 2^e1`` is exact; ``e2 = round(log2 |d|)``; the value is
``2^e1 + sign(d) 2^e2`` where ``e1 - e2 <= 4``, else ``2^e1``. Both roundings are to the nearest *exponent*: an exponent
changes where a number passes sqrt(2) times a power of two, which no binary number is, so there are no ties. We compare
with sqrt(2) in float64 instead of taking logarithms: the same on every machine, to the last bit.

**Values.** In each binade ``2^e <= |w| < 2^(e + 1)`` seven, and these are the bounds between them, in units of 2^e:

=====  ======  =================================
code   value   takes weights
=====  ======  =================================
0      1       from (the last bound below) to 1.04419
1      1.0625  up to 1.08839
2      1.125   up to 1.17678
3      1.25    up to 1.35355
4      1.5     up to 1.64645
5      1.75    up to 1.82322
6      1.875   up to 1.91161; above, 1 of the next binade
7      none    with exponent code 0 it is zero; else it does not occur
=====  ======  =================================

The bounds are ``1 + sqrt(2) 2^-k`` for k = 5, 4, 3, 2, and ``2 - sqrt(2) 2^-k`` for k = 2, 3, 4. The relative error is
at most 0.1082, just below 1.35355, and 0.041 in the root mean square; steps are fine beside powers of two and coarse
between.

**Byte.** Bit 7 is the sign, bits 6 to 3 the exponent code, bits 2 to 0 the code above: a value is
``sign * 2^(top - 15 + exponent code) * value``, and bytes of positive weights are in the order of their values. The
authors' repository rounds and stores nothing; that it is sixteen exponents and this layout is our decision. ``top`` is
that of the largest weight of a tensor and stands beside the bytes.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from regularized.mechanisms.ranges import allowed, between, count

__all__ = ["MANTISSAS", "PackedRF8", "rf8"]

MANTISSAS: tuple[float, ...] = (1.0, 1.0625, 1.125, 1.25, 1.5, 1.75, 1.875)
"""The values of a binade by code, in units of its power of two."""

_ZERO = 7  # the byte that no value has
_BINADES = 16


@allowed(limit=count(0, "the largest e1 - e2 at which the second power is kept", "the authors' is 4"))
@torch.no_grad()
def rf8(weights: Tensor, *, limit: int = 4) -> Tensor:
    """Round to RF8 with exponents without bounds, as the authors' code does: what a model would compute with.

    Args:
        weights: any shape, floating point; zero stays zero.
        limit: default 4, the authors': 0 keeps powers of two alone.

    Returns:
        The same shape and type; idempotent and odd.

    Raises:
        TypeError: weights that are no real floating-point numbers.
        ValueError: one of them is not finite.

    Examples:
        >>> rf8(torch.tensor([1.0, 1.04, 1.05, -1.3, 1.4, 0.0]))
        tensor([ 1.0000,  1.0000,  1.0625, -1.2500,  1.5000,  0.0000])
    """
    exact = _checked(weights)
    power, residual, depth = _split(exact.abs(), limit)
    kept = torch.ldexp(torch.ones_like(residual), power - depth).copysign(residual)
    value = torch.ldexp(torch.ones_like(exact), power) + torch.where(depth > limit, 0.0, kept)
    return torch.where(exact == 0, 0.0, value).copysign(exact).to(weights.dtype)


@dataclass(frozen=True, slots=True)
class PackedRF8:
    """A tensor in RF8, a byte a weight.

    Args:
        codes: uint8, of the shape of the weights; the layout stands above.
        top: the exponent of the highest of the sixteen binades.
        flushed: how many weights were at most half of the smallest value, and became zero.
        raised: how many were above half of the smallest value but below it, and became that.
        saturated: how many were too large for the highest, and became the largest value.

    Raises:
        TypeError: codes that are not uint8.
        ValueError: a byte that stands for no value, or a top outside [-1000, 1000].

    Examples:
        >>> packed = PackedRF8.pack(torch.tensor([1.3, -0.02, 0.0, 1e-9]))
        >>> packed.codes.tolist(), packed.flushed, packed.unpack()
        ([123, 203, 7, 7], 1, tensor([ 1.2500, -0.0195,  0.0000,  0.0000]))
    """

    codes: Tensor
    top: int
    flushed: int = 0
    raised: int = 0
    saturated: int = 0

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"codes must be uint8, a byte a weight; got {self.codes.dtype}")
        between(-1000, 1000, whole=True)("top", self.top)
        if bool(((self.codes & 7 == _ZERO) & (self.codes != _ZERO)).any()):
            raise ValueError("some bytes are no RF8: code 7 occurs in the byte 7 alone, which is zero")

    @classmethod
    @torch.no_grad()
    def pack(cls, weights: Tensor, *, top: int | None = None) -> Self:
        """Round and pack.

        Args:
            weights: any shape, floating point, finite.
            top: exponent of the highest binade; default that of the largest weight, rounded. With a lower one, larger
                weights saturate.

        Raises:
            TypeError: weights that are no real floating-point numbers.
            ValueError: one of them is not finite.
        """
        exact = _checked(weights)
        magnitude = rf8(exact).abs()
        mantissa, exponent = torch.frexp(magnitude)  # mantissa in [1/2, 1)
        exponent = exponent - 1
        if top is None:
            top = int(exponent.masked_fill(magnitude == 0, -1000).max()) if magnitude.numel() else 0
            top = max(top, -1000 + _BINADES)
        lowest = top - _BINADES + 1
        table = torch.tensor(MANTISSAS, dtype=torch.float64, device=exact.device)
        code = torch.searchsorted(table, 2 * mantissa)
        small, large = (exponent < lowest) & (magnitude > 0), exponent > top
        raised = small & (exact.abs() > math.ldexp(0.5, lowest))
        zero = (magnitude == 0) | (small & ~raised)
        level = torch.where(large, _BINADES - 1, exponent - lowest).clamp(0, _BINADES - 1)
        code = torch.where(large, len(MANTISSAS) - 1, torch.where(raised, 0, code))
        sign = torch.signbit(exact) & ~zero
        byte = torch.where(zero, _ZERO, sign.long() * 128 + level * 8 + code)
        flushed, lifted, cut = (int(t.sum()) for t in (small & ~raised, raised, large))
        return cls(byte.to(torch.uint8), top, flushed, lifted, cut)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights, exactly: five significant bits fit every floating-point type, the exponents float32.

        Args:
            dtype: of the result; default float32.
        """
        codes = self.codes.long()
        table = torch.tensor([*MANTISSAS, 0.0], dtype=torch.float64, device=codes.device)
        value = torch.ldexp(table[codes & 7], (codes >> 3 & 15) + (self.top - _BINADES + 1))
        return torch.where(codes >= 128, -value, value).to(dtype)


def _checked(weights: Tensor) -> Tensor:
    if not weights.is_floating_point():
        raise TypeError(f"RF8 rounds real floating-point numbers, got {weights.dtype}")
    exact = weights.detach().double()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("one of the weights is not finite (NaN or infinite), and RF8 has no code for that")
    return exact


def _split(magnitude: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The exponent e1, the residual in units of 2^e1, and ``e1 - e2``, at most ``limit + 1``."""
    mantissa, exponent = torch.frexp(magnitude)  # mantissa in [1/2, 1)
    upper = mantissa >= math.sqrt(0.5)  # the double is just above the root, and no double lies between
    power = torch.where(upper, exponent, exponent - 1)
    residual = torch.where(upper, mantissa, 2 * mantissa) - 1.0
    bounds = [math.sqrt(0.5) * 2.0**-k for k in range(limit, 0, -1)]  # where e2 = -k begins
    table = torch.tensor(bounds, dtype=torch.float64, device=magnitude.device)
    depth = limit + 1 - torch.bucketize(residual.abs(), table, right=True)
    return power, residual, depth
