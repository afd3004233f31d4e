"""Formats whose values share a scale: amax scaling, OCP's microscaling (MX), NVFP4, block floating point.

=================  ====================================================================================================
amax               the largest magnitude among the values that share a scale
P                  the format of an element; ``largest`` and ``emax`` are its largest value and that value's exponent
X, s               the scale: a value is X times an element, and the element is P's cast of x / X
g                  NVFP4: the scale of the whole tensor, on which those of the blocks are E4M3
=================  ====================================================================================================

An MX scale is a power of two, X = 2^k with k in [-127, 127], from the exponent and mantissa of amax alone, exactly:

=========  ==================================================================================  ========================
rule       k = floor(log2 amax) - emax, and one more where                                     elements are cut
=========  ==================================================================================  ========================
floor      never                                                                               up to 8/6 (E2M1), 512/448
ceil       amax is no power of two                                                             never
even       amax, rounded to P's mantissa (half upwards), is the next power of two              up to the same
rceil      the mantissa of amax is above that of P's largest: k = ceil(log2(amax / largest))   never
=========  ==================================================================================  ========================

``floor`` is the rule of the specification and the default; ``rceil`` is NVIDIA's, and the better one for training.
What is zero throughout has X = 2^-127 and elements zero. A NaN or an infinity makes its whole block NaN. The axis of a
block is that which the product sums over, so a tensor that enters two products is quantized twice.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

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
from regularized.compression.low_precision.elements import Element, FixedPoint, PowerOfTwo, element
from regularized.compression.low_precision.formats import Encoded, Format
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import Choice, between, positive

__all__ = ["MX", "NVFP4", "BlockFloat", "ScaleMin", "ScaleRule", "Scaled", "SharedScale", "shared_exponents"]

ScaleRule: TypeAlias = Literal["floor", "ceil", "even", "rceil"]
ScaleMin: TypeAlias = Literal["subnormal", "normal"]

_RULES = Choice("floor", "ceil", "even", "rceil")


def shared_exponents(amax: Tensor, form: Element, rule: ScaleRule = "floor") -> Tensor:
    """The exponents k of MX scales, see the module.

    Args:
        amax: float32 or float64, not negative; of what is not finite the result means nothing.
        form: the elements' format.
        rule: see the module.

    Returns:
        int32 in [-127, 127].

    Examples:
        >>> amax = torch.tensor([1.0, 1.75, 1.8, 1.97])
        >>> rules = ("floor", "even", "rceil", "ceil")
        >>> {rule: shared_exponents(amax, element("e4m3"), rule).tolist() for rule in rules}
        {'floor': [-8, -8, -8, -8], 'even': [-8, -8, -8, -7], 'rceil': [-8, -8, -7, -7], 'ceil': [-8, -7, -7, -7]}
    """
    _RULES("scale", rule)
    emax = form.largest_exponent
    if amax.dtype == torch.float32 and emax > 1:  # then a subnormal amax has k = -127 whatever its mantissa
        # What is added carries into the exponent just where the rule says "one more".
        top = (1 << 23) - 1
        carry = {
            "floor": 0,
            "ceil": top,
            "even": 1 << (22 - form.mantissa_bits),
            "rceil": top - int(math.frexp(form.largest)[0] * (1 << 24)) + (1 << 23),
        }[rule]
        return ((amax.view(torch.int32) + carry) >> 23).sub_(127 + emax).clamp_(-127, 127)
    share, exponent = torch.frexp(amax)  # amax = share * 2^exponent, share in [1/2, 1)
    k = exponent - (1 + emax)
    if rule == "ceil":
        k = k + (share > 0.5)
    elif rule == "even":
        k = k + (share >= 1.0 - 2.0 ** -(form.mantissa_bits + 2))
    elif rule == "rceil":
        k = k + (share > math.frexp(form.largest)[0])
    return torch.where(amax == 0, -127, k.clamp(-127, 127)).int()


def _power_of_two(k: Tensor, dtype: torch.dtype) -> Tensor:
    """2^k exactly, for k in [-127, 127]; a float32 of 2^-127 is subnormal."""
    if dtype == torch.float64:
        return ((k.long() + 1023) << 52).view(torch.float64)
    return torch.where(k == -127, 1 << 22, (k + 127) << 23).view(torch.float32)


class SharedScale(Format):
    """What formats with scales have in common: a scale for each block, and elements in a format of their own."""

    @property
    def elements(self) -> Element:
        """The elements' format P."""
        raise NotImplementedError

    @property
    def shares(self) -> Granularity:
        """What shares a scale."""
        raise NotImplementedError

    @property
    def smallest_block(self) -> int:
        """The block, where it is one along an axis."""
        return self.shares if isinstance(self.shares, int) else 1

    @property
    def needs_axis(self) -> bool:
        """Whether rows or blocks lie along an axis."""
        return self.shares == "row" or isinstance(self.shares, int)

    def scales(self, amax: Tensor) -> Tensor:
        """The scales from the largest magnitudes of all blocks: 0 where all values of a block become 0.

        Args:
            amax: float32 or float64, an entry for each block.
        """
        raise NotImplementedError

    def _divided(self, view: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
        """x / X, which the elements' format then rounds; 0 where the scale is."""
        return view / torch.where(scale == 0, math.inf, scale)

    def _stored(self, amax: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        """What is stored of the scales."""
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"{self.name}: a block holds NaN or infinity, for which its scale has no code")
        return (scale,)

    def _restored(self, stored: tuple[Tensor, ...]) -> Tensor:
        return stored[0]

    def _split(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        view, axes = split(x, self.shares, axis)
        # Two reductions instead of the magnitudes of all values, which would be a tensor more.
        amax = torch.maximum(view.amax(axes, keepdim=True), view.amin(axes, keepdim=True).neg_())
        return view, amax, self.scales(amax)

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        view, amax, scale = self._split(x, axis)
        elements = self.elements.cast_(self._divided(view, amax, scale), rounder, view)
        return join(elements.mul_(scale), x.shape, self.shares, axis)

    def limit(self, x: Tensor, *, axis: int = -1) -> Tensor:
        """The largest element times the block's scale."""
        view, _, scale = self._split(x, axis)
        return join((scale * self.elements.largest).expand_as(view), x.shape, self.shares, axis)

    def _encode(self, x: Tensor, axis: int, rounder: Rounder) -> Encoded:
        view, amax, scale = self._split(x, axis)
        stored = self._stored(amax, scale)
        values = self.elements.cast_(self._divided(view, amax, scale), rounder, view)
        values = torch.where(torch.isnan(scale), 0.0, values)  # the scale says NaN; the elements need not
        return Encoded(join(self.elements.codes(values), x.shape, self.shares, axis), stored)

    def _decode(self, encoded: Encoded, axis: int) -> Tensor:
        scale = self._restored(encoded.scales)
        view, _ = split(self.elements.values(encoded.codes).to(scale.dtype), self.shares, axis)
        return join(view * scale, encoded.codes.shape, self.shares, axis)


@dataclass(frozen=True, slots=True)
class Scaled(SharedScale):
    """Elements times a scale of full precision, s = amax / largest: the largest value of a block is on the grid.

    With integers it is symmetric int-b quantization: per tensor, per row, per block, or in tiles of 32 x 32 (Jetfire).
    With E4M3 it is FP8 with current scaling, and in tiles of 1 x 128 and 128 x 128 DeepSeek-V3's.

    Args:
        form: the elements, by name or as a format: ``"int8"``, ``"int4"``, ``"e4m3"``, ...
        granularity: what shares a scale: ``"tensor"`` (default), ``"row"``, a block size or a tile.
        onto: what amax is scaled onto; default the largest element. Less for formats that are coarse there, as posits
            are.

    Examples:
        >>> Scaled("int8").quantize(torch.tensor([0.1, -1.27, 0.504]))
        tensor([ 0.1000, -1.2700,  0.5000])
    """

    form: Element | str = "int8"
    granularity: Granularity = "tensor"
    onto: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.form, str):
            object.__setattr__(self, "form", element(self.form))
        check_granularity("granularity", self.granularity)
        positive().or_none("the largest element")("onto", self.onto)

    @property
    def elements(self) -> Element:
        """The elements' format."""
        assert isinstance(self.form, Element)
        return self.form

    @property
    def shares(self) -> Granularity:
        """The granularity."""
        return self.granularity

    @property
    def name(self) -> str:
        """Such as ``int8 a tensor``."""
        return f"{self.elements.name} / {describe(self.granularity)}"

    @property
    def bits(self) -> float:
        """Those of an element, and 32 a scale."""
        return self.elements.bits + 32.0 * scales_per_value(self.granularity)

    def scales(self, amax: Tensor) -> Tensor:
        """amax / largest; 1 where that is 0."""
        scale = amax / (self.elements.largest if self.onto is None else self.onto)
        return torch.where(scale == 0, 1.0, scale)


@dataclass(frozen=True, slots=True)
class MX(SharedScale):
    """OCP's microscaling formats: elements times a power of two for each block, see the module.

    Args:
        form: the elements: ``"e4m3"``, ``"e5m2"``, ``"e3m2"``, ``"e2m3"``, ``"e2m1"`` or ``"int8"``, whose values are
            multiples of 1/64 up to 127/64.
        block: values that share a scale; default 32, the specification's. Or a tile: one of 32 x 32 serves both
            products of a tensor.
        scale: the rule for the scale; default ``"floor"``, the specification's.

    Raises:
        ValueError: another element format or rule.

    Examples:
        >>> MX("e2m1", block=4).quantize(torch.tensor([0.1, 0.6, 1.2, -7.9]))
        tensor([ 0.0000,  0.5000,  1.0000, -6.0000])
    """

    form: str = "e4m3"
    block: int | tuple[int, int] = 32
    scale: ScaleRule = "floor"

    def __post_init__(self) -> None:
        Choice("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8", meaning="an element format of OCP MX")("form", self.form)
        check_granularity("block", self.block)
        _RULES("scale", self.scale)

    @property
    def elements(self) -> Element:
        """The elements' format P."""
        return _MXINT8 if self.form == "int8" else element(self.form)

    @property
    def shares(self) -> Granularity:
        """The block."""
        return self.block

    @property
    def name(self) -> str:
        """Such as ``mxfp4_e2m1``, with what is not the default."""
        kind = "mxint8" if self.form == "int8" else f"mxfp{self.elements.bits:g}_{self.form}"
        block = "" if self.block == 32 else f" / {describe(self.block)}"
        return kind + block + ("" if self.scale == "floor" else f" {self.scale}")

    @property
    def bits(self) -> float:
        """Those of an element, and 8 a scale."""
        return self.elements.bits + 8.0 * scales_per_value(self.block)

    def scales(self, amax: Tensor) -> Tensor:
        """Powers of two; NaN where amax is not finite."""
        scale = _power_of_two(shared_exponents(amax, self.elements, self.scale), amax.dtype)
        return torch.where(amax < math.inf, scale, math.nan)

    def _divided(self, view: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
        return view * scale.reciprocal()  # exact for powers of two, and faster than a division

    def _stored(self, amax: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return (PowerOfTwo().codes(scale),)

    def _restored(self, stored: tuple[Tensor, ...]) -> Tensor:
        return PowerOfTwo().values(stored[0])


_MXINT8 = FixedPoint(8, 6, symmetric=True)


@dataclass(frozen=True, slots=True)
class NVFP4(SharedScale):
    """NVIDIA's 4-bit format: E2M1 elements, an E4M3 scale for each block of 16, a float32 scale for the tensor.

    g = amax(tensor) / (448 * 6), s_b = E4M3(amax_b / 6 / g), and a value is q s_b g.

    Args:
        block: default 16, the hardware's.
        scale_min: where the scales of blocks end: at E4M3's smallest value (default: a block far below the tensor's
            amax becomes 0), or at its smallest ``"normal"`` one, as torchao has it, with its reciprocals: such a block
            keeps a scale that is too large.
        global_scale: g where it is known beforehand; default from the tensor.

    Examples:
        >>> NVFP4().quantize(torch.tensor([0.1, 0.6, 1.2, -6.0]))
        tensor([ 0.0000,  0.5000,  1.0000, -6.0000])
    """

    block: int = 16
    scale_min: ScaleMin = "subnormal"
    global_scale: float | None = None

    def __post_init__(self) -> None:
        check_granularity("block", self.block)
        Choice("subnormal", "normal")("scale_min", self.scale_min)

    @property
    def elements(self) -> Element:
        """E2M1."""
        return element("e2m1")

    @property
    def shares(self) -> Granularity:
        """The block."""
        return self.block

    @property
    def name(self) -> str:
        """``nvfp4``, with the block where it is not 16."""
        return "nvfp4" if self.block == 16 else f"nvfp4 / {self.block}"

    @property
    def bits(self) -> float:
        """4, and 8 a scale."""
        return 4.0 + 8.0 / self.block

    def levels(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        """The two levels: s_b in the shape of ``amax``, values of E4M3; and g, without axes."""
        g = amax.amax() / (448.0 * 6.0) if self.global_scale is None else amax.new_tensor(self.global_scale)
        relative = amax / 6.0 / torch.where(g == 0, 1.0, g)
        if self.scale_min == "normal":
            relative = relative.clamp(2.0**-6, 448.0)
        return element("e4m3").cast(relative, Rounder()), g

    def scales(self, amax: Tensor) -> Tensor:
        """s_b g."""
        blocks, g = self.levels(amax)
        return blocks * g

    def _divided(self, view: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
        if self.scale_min == "subnormal":
            return view / torch.where(scale == 0, math.inf, scale)
        blocks, g = self.levels(amax)
        return view * (torch.where(g == 0, 1.0, 1.0 / g) / blocks)

    def _stored(self, amax: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        blocks, g = self.levels(amax)
        if not bool(torch.isfinite(g)):
            raise ValueError(f"{self.name}: the tensor holds NaN or infinity, for which its scale has no code")
        return element("e4m3").codes(blocks), g

    def _restored(self, stored: tuple[Tensor, ...]) -> Tensor:
        return element("e4m3").values(stored[0]) * stored[1]


@dataclass(frozen=True, slots=True)
class BlockFloat(SharedScale):
    """Block floating point: one exponent, that of amax, and a signed mantissa of so many bits for each value.

    Flexpoint is ``BlockFloat(16, "tensor")``; with 8 bits and blocks of 32 it is MXINT8.

    Args:
        mantissa: bits of a value, its sign included; default 8.
        granularity: what shares the exponent; default blocks of 16.

    Examples:
        >>> BlockFloat(4, 4).quantize(torch.tensor([0.3, 1.0, -1.6, 0.1]))  # steps of 1/4
        tensor([ 0.2500,  1.0000, -1.5000,  0.0000])
    """

    mantissa: int = 8
    granularity: Granularity = 16

    def __post_init__(self) -> None:
        between(2, 24, whole=True, meaning="bits of a value")("mantissa", self.mantissa)
        check_granularity("granularity", self.granularity)

    @property
    def elements(self) -> Element:
        """Fixed point with one bit before the point."""
        return FixedPoint(self.mantissa, self.mantissa - 2, symmetric=True)

    @property
    def shares(self) -> Granularity:
        """The granularity."""
        return self.granularity

    @property
    def name(self) -> str:
        """Such as ``bfp8 / 16``."""
        return f"bfp{self.mantissa} / {describe(self.granularity)}"

    @property
    def bits(self) -> float:
        """Those of a mantissa, and 8 an exponent."""
        return self.mantissa + 8.0 * scales_per_value(self.granularity)

    def scales(self, amax: Tensor) -> Tensor:
        """The power of two below amax."""
        scale = _power_of_two(shared_exponents(amax, self.elements), amax.dtype)
        return torch.where(torch.isfinite(amax), scale, math.nan)

    def _divided(self, view: Tensor, amax: Tensor, scale: Tensor) -> Tensor:
        return view * scale.reciprocal()
