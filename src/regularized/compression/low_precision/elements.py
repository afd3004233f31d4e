"""Formats of a single value: floating point from 4 to 32 bits, fixed point, and the powers of two that scales are.

===================  ==========================================================================================
E, M, bias           bits of the exponent, bits of the mantissa, and what is taken off the exponent's code
s, e, m              the three codes of a value: (-1)^s 2^(e - bias) (1 + m / 2^M), and for e = 0 the subnormals
                     (-1)^s 2^(1 - bias) m / 2^M
emax                 the exponent of the largest value
WL, FL               of fixed point: the bits of a word, and how many of them stand behind the point
===================  ==========================================================================================

The OCP formats of 4, 6 and 8 bits, the "fnuz" ones of AMD, IEEE's half and single precision, bfloat16 and TF32 are rows
of one table; a format that is not there is a :class:`FloatFormat` with other numbers.

A floating-point value is rounded to M bits without a division or a logarithm. Its power of two 2^e stands in its bit
pattern; adding and subtracting 1.5 * 2^(e + 23 - M) in float32 leaves the multiple of 2^(e - M) that is nearest, ties
to even, because that is where the sum's own last bit lies. Below the smallest normal number e stays at its exponent,
which is what makes subnormals.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from regularized.compression.low_precision.formats import Encoded, Format
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import between, finite
from regularized.mechanisms.surgery import close_names

__all__ = [
    "ELEMENTS",
    "Element",
    "FixedPoint",
    "FloatFormat",
    "PowerOfTwo",
    "element",
    "round_significant_",
]

NaNs: TypeAlias = Literal["ieee", "all_ones", "negative_zero", "none"]


def round_significant_(x: Tensor, mantissa: int, exponents: tuple[int, int], rounder: Rounder, signs: Tensor) -> Tensor:
    """Round to so many bits behind the leading one, in place where the rounding allows it.

    Args:
        x: float32 or float64; overwritten.
        mantissa: bits M.
        exponents: the smallest, below which the spacing stays as it is (subnormals); and the largest, far above which
            it may stay, too, since such values overflow.
        rounder: rounding and generator.
        signs: a tensor with the signs of ``x``, which those that become zero keep.

    Examples:
        >>> x = torch.tensor([1.0625, 1.1875, 0.01, -1e-9])
        >>> round_significant_(x.clone(), 3, (-6, 8), Rounder(), x)
        tensor([1.0000, 1.2500, 0.0098, -0.0000])
    """
    whole, exponent_bits, digits = (
        (torch.int32, 0x7F800000, 23) if x.dtype == torch.float32 else (torch.int64, 0x7FF0000000000000, 52)
    )
    power = x.view(whole).bitwise_and(exponent_bits).view(x.dtype)
    power.clamp_(2.0 ** exponents[0], 2.0 ** (exponents[1] + 1))
    if rounder.rounding == "nearest_even":
        magic = power.mul_(1.5 * 2.0 ** (digits - mantissa))
        return x.add_(magic).sub_(magic).copysign_(signs)
    spacing = power.mul_(2.0**-mantissa)
    return rounder.integers(x.div_(spacing)).mul_(spacing).copysign_(signs)


class Element(Format):
    """A format whose values do not share anything, so that it can be the element of one whose values do."""

    @property
    def needs_axis(self) -> bool:
        """False: each value is rounded by itself."""
        return False

    @property
    def largest(self) -> float:
        """The largest finite value."""
        raise NotImplementedError

    @property
    def largest_exponent(self) -> int:
        """emax: the floor of the logarithm of :attr:`largest` to the base 2."""
        return math.frexp(self.largest)[1] - 1

    @property
    def mantissa_bits(self) -> int:
        """Bits behind the leading one."""
        raise NotImplementedError

    def cast(self, x: Tensor, rounder: Rounder) -> Tensor:
        """Values of the format near those of a float32 or float64 tensor, in its type."""
        return self.cast_(x.clone(), rounder, x)

    def cast_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """The same where ``x`` may be overwritten; ``signs`` has its signs."""
        raise NotImplementedError

    def codes(self, values: Tensor) -> Tensor:
        """The codes of values that :meth:`cast` has given."""
        raise NotImplementedError

    def values(self, codes: Tensor) -> Tensor:
        """The values of codes, float32."""
        raise NotImplementedError

    def limit(self, x: Tensor, *, axis: int = -1) -> float:
        """The largest value."""
        return self.largest

    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        return self.cast(x, rounder)

    def _encode(self, x: Tensor, axis: int, rounder: Rounder) -> Encoded:
        return Encoded(self.codes(self.cast(x, rounder)))

    def _decode(self, encoded: Encoded, axis: int) -> Tensor:
        return self.values(encoded.codes)


@dataclass(frozen=True, slots=True)
class FloatFormat(Element):
    """Floating point with sign, exponent and mantissa.

    Args:
        label: its name.
        exponent: bits E, at least 1.
        mantissa: bits M.
        bias: of the exponent.
        nans: which codes are not numbers: ``"ieee"`` the highest exponent, with the infinities; ``"all_ones"`` the code
            of ones alone, without infinities (OCP E4M3); ``"negative_zero"`` the code of -0, without infinities and
            without a negative zero ("fnuz"); ``"none"``.

    Examples:
        >>> half = FloatFormat("fp16", 5, 10, 15)
        >>> half.largest, half.smallest_normal, half.smallest
        (65504.0, 6.103515625e-05, 5.960464477539063e-08)
    """

    label: str
    exponent: int
    mantissa: int
    bias: int
    nans: NaNs = "ieee"

    @property
    def name(self) -> str:
        """Its label."""
        return self.label

    @property
    def bits(self) -> float:
        """One for the sign, E and M; TF32 is kept in 32."""
        width = 1 + self.exponent + self.mantissa
        return 32.0 if width == 19 else float(width)

    @property
    def mantissa_bits(self) -> int:
        """M."""
        return self.mantissa

    @property
    def largest(self) -> float:
        """The largest finite value."""
        highest = (1 << self.exponent) - 1
        fraction = (1 << self.mantissa) - 1
        if self.nans == "ieee":
            highest -= 1
        elif self.nans == "all_ones":
            fraction -= 1
        return float(2.0 ** (highest - self.bias) * (1.0 + fraction / (1 << self.mantissa)))

    @property
    def smallest_normal(self) -> float:
        """The smallest value with all bits of its mantissa."""
        return float(2.0 ** (1 - self.bias))

    @property
    def smallest(self) -> float:
        """The smallest value above zero."""
        return self.smallest_normal * float(2.0**-self.mantissa)

    @property
    def has_infinity(self) -> bool:
        """Whether it has codes for the infinities."""
        return self.nans == "ieee"

    def cast_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """Values of the format near those of ``x``, which may be overwritten; ``signs`` has its signs."""
        if rounder.overflow == "inf" and not self.has_infinity:
            raise ValueError(f'{self.name} has no infinity; overflow must be "saturate"{self._or_nan()}')
        if rounder.overflow == "nan" and self.nans == "none":
            raise ValueError(f'{self.name} has no NaN; overflow must be "saturate"')
        y = self._rounded_(x, rounder, signs)
        if rounder.overflow == "saturate":
            y = y.clamp_(-self.largest, self.largest)
        else:
            beyond = y.abs() > self.largest
            y = torch.where(beyond, torch.full_like(y, float(rounder.overflow)).copysign_(signs), y)
        return y.add_(0.0) if self.nans == "negative_zero" else y  # -0 + 0 is 0

    def _or_nan(self) -> str:
        return "" if self.nans == "none" else ' or "nan"'

    def _rounded_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """Rounded as if the exponent had no upper end."""
        if x.dtype == torch.float32 and (self.exponent, self.bias) == (8, 127):  # float32's own exponents
            if self.mantissa == 23:
                return x
            if self.mantissa == 7 and rounder.rounding == "nearest_even":
                return x.bfloat16().float()
            return rounder.mantissa(x, 23 - self.mantissa)
        return round_significant_(x, self.mantissa, (1 - self.bias, self.largest_exponent), rounder, signs)

    def codes(self, values: Tensor) -> Tensor:
        """Codes of values of the format: uint8 up to 8 bits, int16 for 16.

        Raises:
            TypeError: 19 or 32 bits, which are kept as float32.
            ValueError: there is a NaN or infinity, and the format has none.
        """
        if self.bits > 16:
            raise TypeError(f"{self.name} is kept as float32; it has no codes of its own")
        magnitude = values.float().abs()
        pattern = magnitude.view(torch.int32)
        normal = (pattern >> (23 - self.mantissa)) - ((127 - self.bias) << self.mantissa)
        code = torch.where(magnitude < self.smallest_normal, (magnitude / self.smallest).int(), normal)
        highest = ((1 << self.exponent) - 1) << self.mantissa
        special = ~torch.isfinite(values)
        if self.nans == "none":
            if bool(special.any()):
                raise ValueError(f"{self.name} has no code for NaN or infinity; look at what produced them first")
        else:
            nan = {"ieee": highest + (1 << self.mantissa >> 1), "all_ones": highest + (1 << self.mantissa) - 1}
            infinite = torch.where(torch.isinf(values), highest, nan.get(self.nans, 0))
            code = torch.where(special, infinite, code)
        sign = torch.signbit(values)
        if self.nans == "negative_zero":
            sign = torch.where(special, True, sign & (code != 0))
        code = code | (sign.int() << (self.exponent + self.mantissa))
        return code.to(torch.int16 if self.bits > 8 else torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """Values of codes, float32: bits of higher order are ignored.

        Raises:
            TypeError: 19 or 32 bits.
        """
        if self.bits > 16:
            raise TypeError(f"{self.name} is kept as float32; it has no codes of its own")
        table = _table(self, codes.device)
        index = codes.int().bitwise_and_(len(table) - 1)
        return table.index_select(0, index.flatten()).view(codes.shape)


@lru_cache(maxsize=64)
def _table(form: FloatFormat, device: torch.device) -> Tensor:
    """The value of every code, in order."""
    code = torch.arange(1 << int(form.bits), dtype=torch.int64)
    m = (code & ((1 << form.mantissa) - 1)).double() / (1 << form.mantissa)
    e = (code >> form.mantissa) & ((1 << form.exponent) - 1)
    value = torch.where(e == 0, m * form.smallest_normal, (1.0 + m) * torch.pow(2.0, (e - form.bias).double()))
    negative = (code >> (form.exponent + form.mantissa)) == 1
    value = torch.where(negative, -value, value)
    highest = e == (1 << form.exponent) - 1
    if form.nans == "ieee":
        value = torch.where(highest, torch.where(m == 0, value.sign() * math.inf, math.nan), value)
    elif form.nans == "all_ones":
        value = torch.where(highest & (m == m.max()), math.nan, value)
    elif form.nans == "negative_zero":
        value = torch.where(negative & (m == 0) & (e == 0), math.nan, value)
    return value.float().to(device)


@dataclass(frozen=True, slots=True)
class FixedPoint(Element):
    """Whole numbers times 2^-FL: fixed point, and with FL = 0 the integers that scales are put on.

    Args:
        word: bits WL of a value, from 2 to 24.
        fraction: bits FL behind the point; default 0. It may be negative, or larger than the word.
        symmetric: the smallest value is minus the largest, as integer recipes have it, and as OCP allows for MXINT8;
            default False: two's complement whole, with one negative value more.

    Examples:
        >>> FixedPoint(8, 6).quantize(torch.tensor([1.54, -7.0, 7.0]))  # steps of 1/64
        tensor([ 1.5469, -2.0000,  1.9844])
    """

    word: int
    fraction: int = 0
    symmetric: bool = False

    def __post_init__(self) -> None:
        between(2, 24, whole=True, meaning="bits of a word")("word", self.word)
        finite()("fraction", self.fraction)

    @property
    def name(self) -> str:
        """``int8`` or ``fixed8.6``."""
        return f"int{self.word}" if self.symmetric and self.fraction == 0 else f"fixed{self.word}.{self.fraction}"

    @property
    def bits(self) -> float:
        """WL."""
        return float(self.word)

    @property
    def step(self) -> float:
        """2^-FL."""
        return float(2.0**-self.fraction)

    @property
    def largest(self) -> float:
        """(2^(WL - 1) - 1) 2^-FL."""
        return ((1 << (self.word - 1)) - 1) * self.step

    @property
    def lowest(self) -> float:
        """The most negative value."""
        return -self.largest if self.symmetric else -self.largest - self.step

    @property
    def mantissa_bits(self) -> int:
        """WL - 2: what stands behind the leading one of the largest."""
        return self.word - 2

    def cast_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """Multiples of the step near the values of ``x``, which may be overwritten; what lies outside is cut."""
        if rounder.overflow != "saturate":
            raise ValueError(f'{self.name} has neither infinity nor NaN; overflow must be "saturate"')
        if self.fraction == 0:
            return rounder.integers(x).clamp_(self.lowest, self.largest)
        return rounder.integers(x.mul_(1.0 / self.step)).mul_(self.step).clamp_(self.lowest, self.largest)

    def codes(self, values: Tensor) -> Tensor:
        """Two's complement in the lowest WL bits: uint8 up to 8 bits, else int16 or int32.

        Raises:
            ValueError: there is a NaN.
        """
        if bool(torch.isnan(values).any()):
            raise ValueError(f"{self.name} has no code for NaN; look at what produced it first")
        whole = (values / self.step).round().int().bitwise_and_((1 << self.word) - 1)
        return whole.to(torch.uint8 if self.word <= 8 else torch.int16 if self.word < 16 else torch.int32)

    def values(self, codes: Tensor) -> Tensor:
        """Values of codes, float32."""
        whole = codes.int().bitwise_and_((1 << self.word) - 1)
        sign = 1 << (self.word - 1)
        return ((whole ^ sign) - sign).float().mul_(self.step)


@dataclass(frozen=True, slots=True)
class PowerOfTwo(Element):
    """Powers of two from 2^-127 to 2^127 and nothing else: E8M0, the scale of OCP's microscaling formats.

    There is no zero, no sign and no infinity: what is not above zero becomes NaN. To nearest, 1.5 is rounded up
    whatever the power, and all between 2^-127 and 2^-126 too, as ml_dtypes and torch do; *toward_zero* gives the power
    below. The block formats never round their scales by this cast: their rules are exact, see
    :func:`~regularized.compression.low_precision.blocks.shared_exponents`.

    Examples:
        >>> PowerOfTwo().quantize(torch.tensor([1.4, 1.5, 6.0, -1.0]))
        tensor([1., 2., 8., nan])
    """

    @property
    def name(self) -> str:
        """``float8_e8m0fnu``."""
        return "float8_e8m0fnu"

    @property
    def bits(self) -> float:
        """8."""
        return 8.0

    @property
    def largest(self) -> float:
        """2^127."""
        return 2.0**127

    @property
    def mantissa_bits(self) -> int:
        """0."""
        return 0

    def cast_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """The power near each value."""
        if rounder.overflow == "inf":
            raise ValueError(f'{self.name} has no infinity; overflow must be "saturate" or "nan"')
        share, exponent = torch.frexp(x.double())  # x = share * 2^exponent, share in [1/2, 1)
        behind = 2.0 * share - 1.0
        if rounder.rounding.startswith("nearest"):
            up = (behind >= 0.5) | ((exponent == -126) & (behind > 0))
        else:
            up = rounder.integers(behind) > 0
        power = (exponent - 1 + up.int()).clamp_min_(-127)
        beyond = (power > 127) | torch.isinf(x)
        value = torch.ldexp(torch.ones_like(share), power.clamp_max_(127))
        value = torch.where(beyond, self.largest if rounder.overflow == "saturate" else math.nan, value)
        return torch.where(x > 0, value, math.nan).to(x.dtype)

    def codes(self, values: Tensor) -> Tensor:
        """The exponent plus 127; 255 for NaN."""
        exponent = torch.frexp(values.double())[1] + 126
        return torch.where(torch.isnan(values), 255, exponent).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """2^(code - 127), float32."""
        value = torch.ldexp(torch.ones(codes.shape, dtype=torch.float64, device=codes.device), codes.int() - 127)
        return torch.where(codes == 255, math.nan, value).float()


ELEMENTS: dict[str, Element] = {
    form.name: form
    for form in (
        FloatFormat("fp32", 8, 23, 127),
        FloatFormat("tf32", 8, 10, 127),
        FloatFormat("bf16", 8, 7, 127),
        FloatFormat("fp16", 5, 10, 15),
        FloatFormat("float8_e4m3fn", 4, 3, 7, "all_ones"),
        FloatFormat("float8_e5m2", 5, 2, 15),
        FloatFormat("float8_e4m3fnuz", 4, 3, 8, "negative_zero"),
        FloatFormat("float8_e5m2fnuz", 5, 2, 16, "negative_zero"),
        FloatFormat("float6_e2m3fn", 2, 3, 1, "none"),
        FloatFormat("float6_e3m2fn", 3, 2, 3, "none"),
        FloatFormat("float4_e2m1fn", 2, 1, 1, "none"),
        PowerOfTwo(),
        FixedPoint(8, symmetric=True),
        FixedPoint(4, symmetric=True),
    )
}
"""By the names of ml_dtypes and of the survey."""

_SHORT = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "e2m3": "float6_e2m3fn",
    "e3m2": "float6_e3m2fn",
    "e2m1": "float4_e2m1fn",
    "e8m0": "float8_e8m0fnu",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
}


def element(name: str) -> Element:
    """A format of single values by its name or the short one, such as ``"e4m3"``.

    Raises:
        ValueError: there is none of that name; those that there are stand in the message.

    Examples:
        >>> element("e2m1").largest, element("bf16").bits
        (6.0, 16.0)
    """
    found = ELEMENTS.get(_SHORT.get(name, name))
    if found is None:
        names = [*ELEMENTS, *_SHORT]
        raise ValueError(f"there is no element format {name!r}; {close_names([name], names)}. All: {', '.join(names)}")
    return found
