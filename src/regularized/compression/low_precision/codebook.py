"""Any finite set of numbers as a format: posits, logarithmic numbers, signed digits, optimizer states.

A codebook is an element like the others: :class:`~regularized.compression.low_precision.blocks.Scaled` gives it a scale
for each block. Nearest means nearest as numbers, ties to the even code; codes are counted from the smallest value up.
(The posit standard rounds nearest in the bit pattern, which differs where the spacing changes with the value, and
never rounds to zero. A codebook knows neither.)
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from regularized.compression.low_precision.elements import Element
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import allowed, between

__all__ = ["Codebook", "dynamic_tree", "evenly_above_zero", "float_sd", "logarithmic", "posit", "powers_of_two"]


@dataclass(frozen=True, slots=True)
class Codebook(Element):
    """Numbers to round to.

    Args:
        label: its name.
        numbers: at least two, finite, ascending.

    Raises:
        ValueError: fewer, not finite, or not ascending.

    Examples:
        >>> Codebook("thirds", (0.0, 1.0, 3.0)).quantize(torch.tensor([0.4, 0.5, 2.0, 9.0]))  # ties to codes 0 and 2
        tensor([0., 0., 3., 3.])
    """

    label: str
    numbers: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.numbers, self.numbers[1:]))
        if len(self.numbers) < 2 or not ascending or not all(map(math.isfinite, self.numbers)):
            raise ValueError(
                f"numbers must be at least two, finite and ascending, got {len(self.numbers)} in {self.label!r}; "
                "sorted(set(...)) orders them"
            )

    @property
    def name(self) -> str:
        """Its label."""
        return self.label

    @property
    def bits(self) -> float:
        """Those of a code."""
        return float(math.ceil(math.log2(len(self.numbers))))

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.numbers[0]), abs(self.numbers[-1]))

    @property
    def mantissa_bits(self) -> int:
        """Those that tell the two largest numbers apart, rounded down."""
        return max(0, int(math.log2(self.largest / abs(self.numbers[-1] - self.numbers[-2]))))

    def cast_(self, x: Tensor, rounder: Rounder, signs: Tensor) -> Tensor:
        """The numbers near the values of ``x``; what lies outside is cut, NaN stays."""
        if rounder.overflow != "saturate":
            raise ValueError(f'{self.name} has neither infinity nor NaN; overflow must be "saturate"')
        numbers = _numbers(self, x.dtype, x.device)
        found = numbers.index_select(0, self._index(x, rounder).flatten()).view(x.shape)
        return torch.where(torch.isnan(x), x, found)

    def _index(self, x: Tensor, rounder: Rounder) -> Tensor:
        if rounder.rounding in ("nearest_even", "nearest_away"):
            ends = _boundaries(self, x.dtype, x.device, rounder.rounding)
            table = _first_codes(self, x.device, rounder.rounding) if x.dtype == torch.float32 else None
            if table is None:
                return torch.bucketize(x, ends, out_int32=True)
            # The upper half of the pattern leaves two codes at most; one comparison decides between them.
            half = (x.contiguous().view(torch.int32) >> 16).bitwise_and_(0xFFFF)
            first = table.index_select(0, half.flatten()).view(x.shape)
            return first + (x > _with_end(ends).index_select(0, first.flatten()).view(x.shape))
        numbers = _numbers(self, x.dtype, x.device)
        last = len(self.numbers) - 1
        below = (torch.bucketize(x, numbers, right=True, out_int32=True) - 1).clamp_(0, last)
        if rounder.rounding == "toward_zero":
            above = torch.bucketize(x, numbers, out_int32=True).clamp_(0, last)
            return torch.where(x < 0, above, below)
        above = (below + 1).clamp_(max=last)
        low, high = (numbers.index_select(0, i.flatten()).view(x.shape) for i in (below, above))
        share = ((x - low) / torch.where(above == below, 1.0, high - low)).clamp_(0.0, 1.0)
        return (below + rounder.integers(share.nan_to_num_(0.0)).int()).clamp_(max=last)

    def codes(self, values: Tensor) -> Tensor:
        """Places in the list of numbers: uint8 up to 256 of them, else int32.

        Raises:
            ValueError: there is a NaN.
        """
        if bool(torch.isnan(values).any()):
            raise ValueError(f"{self.name} has no code for NaN; look at what produced it first")
        return self.nearest(values)

    def nearest(self, x: Tensor) -> Tensor:
        """The codes of the numbers nearest to any values, without a look for NaN, which would wait for the device."""
        index = self._index(x, Rounder())
        return index.to(torch.uint8) if len(self.numbers) <= 256 else index

    def values(self, codes: Tensor) -> Tensor:
        """The numbers of codes, float32."""
        numbers = _numbers(self, torch.float32, codes.device)
        return numbers.index_select(0, codes.int().flatten()).view(codes.shape)


@lru_cache(maxsize=64)
def _numbers(book: Codebook, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(book.numbers, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def _boundaries(book: Codebook, dtype: torch.dtype, device: torch.device, rounding: str) -> Tensor:
    """The largest number of a type that still belongs to each code but the last: ties are decided here, once."""
    exact = torch.tensor(book.numbers, dtype=torch.float64)
    middles = 0.5 * (exact[:-1] + exact[1:])
    ends = middles.to(dtype)
    lowest = torch.tensor(-math.inf, dtype=dtype)
    ends = torch.where(ends.double() > middles, torch.nextafter(ends, lowest), ends)
    tie = ends.double() == middles
    up = torch.arange(len(middles)) % 2 == 1 if rounding == "nearest_even" else middles > 0
    return torch.where(tie & up, torch.nextafter(ends, lowest), ends).to(device)


def _with_end(ends: Tensor) -> Tensor:
    return torch.cat([ends, ends.new_full((1,), math.inf)])


@lru_cache(maxsize=64)
def _first_codes(book: Codebook, device: torch.device, rounding: str) -> Tensor | None:
    """The lowest code among the float32 that share the upper 16 bits, for each of them; None where more than two do."""
    half = torch.arange(1 << 16, dtype=torch.int32) << 16  # wraps round into the negative patterns
    starts, lasts = half.view(torch.float32), (half | 0xFFFF).view(torch.float32)
    ends = _boundaries(book, torch.float32, torch.device("cpu"), rounding)
    codes = [torch.bucketize(bound.nan_to_num(0.0, math.inf, -math.inf), ends) for bound in (starts, lasts)]
    low, high = torch.minimum(*codes), torch.maximum(*codes)
    special = ~torch.isfinite(starts)  # infinities, and NaN, whose code means nothing
    edge = torch.bucketize(starts.nan_to_num(0.0, math.inf, -math.inf), ends)
    low, high = torch.where(special, edge, low), torch.where(special, edge, high)
    return low.int().to(device) if bool((high - low <= 1).all()) else None


@allowed(
    bits=between(3, 16, whole=True, meaning="bits of a posit"), exponent=between(0, 4, whole=True, meaning="es, bits")
)
def posit(bits: int = 8, exponent: int = 1) -> Codebook:
    """The numbers of posit<n, es>: most digits near 1, fewest at both ends.

    Args:
        bits: n.
        exponent: es; default 1. The standard of 2022 has 2.

    Examples:
        >>> posit(8, 0).largest, posit(16, 1).largest == 2.0**28, len(posit(8, 2).numbers)
        (64.0, True, 255)
    """
    positive = [_posit_value(code, bits, exponent) for code in range(1, 1 << (bits - 1))]
    return Codebook(f"posit{bits}es{exponent}", (*(-v for v in reversed(positive)), 0.0, *positive))


def _posit_value(code: int, bits: int, exponent: int) -> float:
    """Behind the sign stand a run of equal bits, the bit that ends it, es bits of exponent, and the fraction."""
    body = [code >> i & 1 for i in range(bits - 2, -1, -1)]
    run = next((i for i, bit in enumerate(body) if bit != body[0]), len(body))
    regime = run - 1 if body[0] else -run
    rest = body[run + 1 :]
    power = 0
    for i in range(exponent):
        power = 2 * power + (rest[i] if i < len(rest) else 0)
    fraction = sum(bit * 2.0 ** -(i + 1) for i, bit in enumerate(rest[exponent:]))
    return float(2.0 ** (regime * (1 << exponent) + power) * (1.0 + fraction))


@allowed(bits=between(3, 12, whole=True), fraction=between(0, 8, whole=True))
def logarithmic(bits: int = 8, fraction: int = 3) -> Codebook:
    """Logarithmic numbers: a sign, zero, and powers of two whose exponents have so many bits behind the point.

    Args:
        bits: of a code; default 8.
        fraction: bits behind the point of the exponent; default 3: eight values an octave.

    Examples:
        >>> logarithmic(4, 0).numbers[7:]
        (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    """
    most = (1 << (bits - 2)) - 1
    positive = [2.0 ** (j / (1 << fraction)) for j in range(-most, most + 1)]
    return Codebook(f"log{bits}.{fraction}", (*(-v for v in reversed(positive)), 0.0, *positive))


@allowed(bits=between(2, 8, whole=True))
def powers_of_two(bits: int = 4) -> Codebook:
    """Zero, and plus or minus 1, 1/2, 1/4, ...: products are shifts.

    Args:
        bits: of a code; default 4.

    Examples:
        >>> powers_of_two(3).numbers
        (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    """
    positive = [2.0**-j for j in reversed(range((1 << (bits - 1)) - 1))]
    return Codebook(f"pow2_{bits}", (*(-v for v in reversed(positive)), 0.0, *positive))


@allowed(exponent=between(1, 6, whole=True, meaning="bits"))
def float_sd(exponent: int = 3) -> Codebook:
    """FloatSD8's numbers: mantissas of two groups of signed digits, one digit of each group not zero, and an exponent.

    Args:
        exponent: bits; default 3.

    Examples:
        >>> [16 * n for n in float_sd(1).numbers if n >= 0.25], float_sd().largest
        ([4.0, 4.5, 5.0, 6.0, 7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 14.0, 15.0, 16.0, 17.0, 18.0], 1.125)
    """
    mantissas = {4 * a + b for a in (0, 1, 2, 4, -1, -2, -4) for b in (0, 1, 2, -1, -2)}
    numbers = {m / 16 * 2.0**-e for m in mantissas for e in range(1 << exponent)}
    return Codebook(f"floatsd e{exponent}", tuple(sorted(numbers)))


@allowed(bits=between(3, 8, whole=True), exponent=between(1, 7, whole=True))
def dynamic_tree(bits: int = 8, exponent: int = 7, *, signed: bool = True) -> Codebook:
    """The code of block-wise 8-bit optimizers (Dettmers et al. 2021), as bitsandbytes and torchao have it.

    In each decade 10^(i - E), i = 0 ... E - 1 counted from the smallest, stand the middles of 2^i equal parts of
    [0.1, 1] (2^(i + 1) where there is no sign); besides there are 0 and 1.

    Args:
        bits: of a code; default 8.
        exponent: decades E; default 7, the most for 8 bits; 3 for 4 bits.
        signed: for first moments; False for second moments.

    Raises:
        ValueError: the decades and digits do not make 2^bits numbers.

    Examples:
        >>> tree = dynamic_tree(4, 3)
        >>> len(tree.numbers), [round(number, 4) for number in tree.numbers[-3:]]
        (16, [0.6625, 0.8875, 1.0])
    """
    numbers = {0.0, 1.0}
    for i in range(exponent):
        parts = 1 << (i + bits - 1 - exponent + (not signed))
        edges = torch.linspace(0.1, 1.0, parts + 1, device="cpu")  # float32, as those tables have it: the same bits
        for middle in (10.0 ** (i + 1 - exponent) * ((edges[:-1] + edges[1:]) / 2.0)).tolist():
            numbers |= {middle, -middle} if signed else {middle}
    if len(numbers) != 1 << bits:
        raise ValueError(f"{exponent} decades make {len(numbers)} numbers, not the {1 << bits} of {bits} bits")
    return Codebook(f"dynamic{bits}{'' if signed else ' unsigned'}", tuple(sorted(numbers)))


@allowed(bits=between(2, 8, whole=True))
def evenly_above_zero(bits: int = 4) -> Codebook:
    """1/n, 2/n, ..., 1 with n = 2^bits: second moments in 4 bits, where a zero would make the step infinite (Li 2023).

    Args:
        bits: of a code; default 4.

    Examples:
        >>> evenly_above_zero(2).numbers
        (0.25, 0.5, 0.75, 1.0)
    """
    count = 1 << bits
    return Codebook(f"linear{bits} without zero", tuple((i + 1) / count for i in range(count)))
