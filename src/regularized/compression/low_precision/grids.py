"""Formats whose grid follows the whole tensor: affine and dynamic fixed point, binary and ternary weights, and kin."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.compression.low_precision.blocking import (
    Granularity,
    check_granularity,
    describe,
    join,
    scales_per_value,
    split,
)
from regularized.compression.low_precision.blocks import Scaled, SharedScale, shared_exponents
from regularized.compression.low_precision.elements import Element, FixedPoint, element
from regularized.compression.low_precision.formats import Encoded, Format
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import at_least, between

__all__ = ["Affine", "Binary", "DoReFa", "DynamicFixedPoint", "FallBack", "ShiftedSqueezed", "Ternary"]


@dataclass(frozen=True, slots=True)
class Affine(Format):
    """Unsigned integers with a zero point: s = (max - min) / (2^b - 1), z = rne(-min / s), the range holding 0.

    Args:
        word: bits b; default 8.
        granularity: what shares scale and zero point; default the tensor.

    Examples:
        >>> Affine(2).quantize(torch.tensor([-1.0, 0.1, 0.9, 2.0]))
        tensor([-1.,  0.,  1.,  2.])
    """

    word: int = 8
    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        between(1, 8, whole=True, meaning="bits")("word", self.word)
        check_granularity("granularity", self.granularity)

    @property
    def name(self) -> str:
        """Such as ``uint8 a tensor``."""
        return f"uint{self.word} / {describe(self.granularity)}"

    @property
    def bits(self) -> float:
        """b, 32 a scale, and b a zero point."""
        return self.word + (32.0 + self.word) * scales_per_value(self.granularity)

    def _grid(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        view, axes = split(x, self.granularity, axis)
        low = view.amin(axes, keepdim=True).clamp(max=0.0)
        step = (view.amax(axes, keepdim=True).clamp(min=0.0) - low) / self._most
        step = torch.where(step == 0, 1.0, step)
        return view, step, (-low / step).round().clamp(0, self._most)

    @property
    def _most(self) -> int:
        return (1 << self.word) - 1

    def _whole(self, x: Tensor, axis: int, rounder: Rounder) -> tuple[Tensor, Tensor, Tensor]:
        if rounder.overflow != "saturate":
            raise ValueError(f'{self.name} has neither infinity nor NaN; overflow must be "saturate"')
        view, step, zero = self._grid(x, axis)
        return rounder.integers(view / step).add_(zero).clamp_(0, self._most), step, zero

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        whole, step, zero = self._whole(x, axis, rounder)
        return join(whole.sub_(zero).mul_(step), x.shape, self.granularity, axis)

    def limit(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """The larger end of each entry's grid: the side on which it lies."""
        view, step, zero = self._grid(x, axis)
        end = torch.where(view < 0, zero * step, (self._most - zero) * step)
        return join(end.expand_as(view), x.shape, self.granularity, axis)

    def _encode(self, x: Tensor, axis: int, rounder: Rounder) -> Encoded:
        whole, step, zero = self._whole(x, axis, rounder)
        if bool(torch.isnan(whole).any()):
            raise ValueError(f"{self.name} has no code for NaN; look at what produced it first")
        codes = join(whole.to(torch.uint8), x.shape, self.granularity, axis)
        return Encoded(codes, (step, zero.to(torch.uint8)))

    def _decode(self, encoded: Encoded, axis: int) -> Tensor:
        step, zero = encoded.scales
        view, _ = split(encoded.codes, self.granularity, axis)
        return join((view.to(step.dtype) - zero.to(step.dtype)) * step, encoded.codes.shape, self.granularity, axis)


@dataclass(frozen=True, slots=True)
class DynamicFixedPoint(SharedScale):
    """Fixed point whose point stands where at most a share of the values is cut: Courbariaux et al. (2015).

    Their controller doubles the range where more values overflow than the share, and halves it where half the range
    would do; this is the range at which it comes to rest, found from the tensor at once, without state.

    Args:
        word: bits of a value; default 8.
        overflow_rate: share of the values that may be cut, in [0, 1); default 0: the largest decides.

    Examples:
        >>> DynamicFixedPoint(4).quantize(torch.tensor([0.1, 0.3, -0.8]))
        tensor([ 0.1250,  0.2500, -0.7500])
    """

    word: int = 8
    overflow_rate: float = 0.0

    def __post_init__(self) -> None:
        between(2, 16, whole=True, meaning="bits of a value")("word", self.word)
        between(0.0, 1.0, "[)")("overflow_rate", self.overflow_rate)

    @property
    def elements(self) -> Element:
        """Integers of the word."""
        return FixedPoint(self.word, symmetric=True)

    @property
    def shares(self) -> Granularity:
        """The tensor."""
        return "tensor"

    @property
    def name(self) -> str:
        """Such as ``dynamic fixed8``."""
        return f"dynamic fixed{self.word}"

    @property
    def bits(self) -> float:
        """The word's."""
        return float(self.word)

    def _split(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        most = x.abs().flatten()
        cut = int(self.overflow_rate * most.numel())
        largest = most.max() if cut == 0 else most.kthvalue(most.numel() - cut).values
        largest = torch.where(torch.isnan(most.sum()), math.nan, largest)
        return x, largest, self.scales(largest)

    def scales(self, amax: Tensor) -> Tensor:
        """The smallest power of two that keeps it in range."""
        k = shared_exponents(amax, self.elements, "rceil")
        return torch.where(torch.isfinite(amax), torch.ldexp(torch.ones_like(amax), k), math.nan)


@dataclass(frozen=True, slots=True)
class Binary(Format):
    """sign(w) mean|w| (XNOR-Net), and 1-bit Adam's compression; zero counts as positive.

    Args:
        granularity: what shares a mean; default the tensor.

    Examples:
        >>> Binary().quantize(torch.tensor([0.5, -1.5, 1.0]))
        tensor([ 1., -1.,  1.])
    """

    granularity: Granularity = "tensor"

    def __post_init__(self) -> None:
        check_granularity("granularity", self.granularity)

    @property
    def name(self) -> str:
        """``binary``."""
        return f"binary / {describe(self.granularity)}"

    @property
    def bits(self) -> float:
        """1, and 32 a mean."""
        return 1.0 + 32.0 * scales_per_value(self.granularity)

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        view, axes = split(x, self.granularity, axis)
        mean = view.abs().mean(axes, keepdim=True)
        return join(torch.where(view < 0, -mean, mean), x.shape, self.granularity, axis)

    def limit(self, x: Tensor, *, axis: int = -1) -> float:
        """Infinity: every magnitude is replaced, none is cut."""
        return math.inf


@dataclass(frozen=True, slots=True)
class Ternary(Format):
    """BitNet b1.58's weights: clip(rne(w / (gamma + eps)), -1, 1) gamma with gamma = mean|w|.

    Args:
        eps: default 1e-5, BitNet's.

    Examples:
        >>> Ternary().quantize(torch.tensor([0.1, -2.0, 0.9]))
        tensor([ 0., -1.,  1.])
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        at_least(0.0)("eps", self.eps)

    @property
    def name(self) -> str:
        """``ternary``."""
        return "ternary"

    @property
    def bits(self) -> float:
        """log2(3)."""
        return math.log2(3.0)

    @property
    def needs_axis(self) -> bool:
        """False."""
        return False

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        gamma = x.abs().mean()
        return rounder.integers(x / (gamma + self.eps)).clamp_(-1.0, 1.0).mul_(gamma)

    def limit(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """gamma."""
        return x.abs().mean().expand_as(x)


@dataclass(frozen=True, slots=True)
class DoReFa(Format):
    """DoReFa-Net's weights: 2 Q(tanh(w) / (2 max|tanh w|) + 1/2) - 1 with Q(r) = rne((2^k - 1) r) / (2^k - 1).

    Args:
        word: bits k; default 4.

    Examples:
        >>> DoReFa(2).quantize(torch.tensor([-1.0, -0.1, 0.3, 1.0]))
        tensor([-1.0000, -0.3333,  0.3333,  1.0000])
    """

    word: int = 4

    def __post_init__(self) -> None:
        between(1, 8, whole=True, meaning="bits")("word", self.word)

    @property
    def name(self) -> str:
        """Such as ``dorefa4``."""
        return f"dorefa{self.word}"

    @property
    def bits(self) -> float:
        """k."""
        return float(self.word)

    @property
    def needs_axis(self) -> bool:
        """False."""
        return False

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        bent = torch.tanh(x)
        most = bent.abs().amax()
        n = float((1 << self.word) - 1)
        r = bent / (2.0 * torch.where(most == 0, 1.0, most)) + 0.5
        return rounder.integers(r * n).div_(n).mul_(2.0).sub_(1.0)

    def limit(self, x: Tensor, *, axis: int = -1) -> float:
        """Infinity: tanh brings every value into range."""
        return math.inf


@dataclass(frozen=True, slots=True)
class ShiftedSqueezed(Format):
    """S2FP8: |x| becomes 2^beta |x|^alpha, so that the logarithms have mean 0 and maximum 15, then E5M2, then back.

    alpha = 15 / (max - mean) and beta = -alpha mean, of log2|x| over what is not zero (Cambier et al. 2020).

    Examples:
        >>> x = torch.tensor([1e-9, 1e-8, -3e-8])
        >>> bool(torch.allclose(ShiftedSqueezed().quantize(x), x, rtol=0.1))  # E5M2 itself would make them 0
        True
    """

    @property
    def name(self) -> str:
        """``s2fp8``."""
        return "s2fp8"

    @property
    def bits(self) -> float:
        """8."""
        return 8.0

    @property
    def needs_axis(self) -> bool:
        """False."""
        return False

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        there = x != 0
        logarithm = torch.where(there, x.abs(), 1.0).log2()
        mean = logarithm.sum() / there.sum().clamp(min=1)
        most = torch.where(there, logarithm, -math.inf).amax()
        spread = most - mean
        alpha = 15.0 / torch.where(torch.isfinite(spread) & (spread > 0), spread, 15.0)
        bent = torch.where(there, torch.exp2(alpha * (logarithm - mean)), 0.0).copysign(x)
        rounded = element("e5m2").cast(bent, rounder)
        back = torch.exp2(torch.where(rounded == 0, 1.0, rounded.abs()).log2() / alpha + mean)
        return torch.where(rounded == 0, 0.0, back).copysign(x)

    def limit(self, x: Tensor, *, axis: int = -1) -> float:
        """Infinity: the largest value is brought into range."""
        return math.inf


_TILES = Scaled("int8", (32, 32))


@dataclass(frozen=True, slots=True)
class FallBack(Format):
    """Blocks in 8 bits, those with outliers in 8 bits twice: what the first left over is quantized again.

    Args:
        form: the format of a block; default INT8 in tiles of 32 x 32.
        above: blocks whose scale is so many times the mean scale fall back; default 2.

    Examples:
        >>> x = torch.tensor([0.1, 0.21, 90.0, 0.33])
        >>> plain, twice = (form.quantize(x) for form in (Scaled("int8", 2), FallBack(Scaled("int8", 2), 1.5)))
        >>> bool((x - twice).abs().sum() < (x - plain).abs().sum())
        True
    """

    form: Scaled = _TILES
    above: float = 2.0

    def __post_init__(self) -> None:
        at_least(0.0)("above", self.above)

    @property
    def name(self) -> str:
        """That of the format, with fall-back."""
        return f"{self.form.name} with fall-back"

    @property
    def bits(self) -> float:
        """Those of the format; a block that falls back takes them twice."""
        return self.form.bits

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        limit = self.form.limit(x, axis=axis)
        first = self.form.rounded(x, rounder, axis=axis)
        second = self.form.rounded(x - first, rounder, axis=axis)
        return torch.where(limit > self.above * limit.mean(), first + second, first)

    def limit(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """That of the format."""
        return self.form.limit(x, axis=axis)
