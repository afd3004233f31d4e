"""What a number format is: values in, the nearest values of the format out; and the codes that are stored for them."""

from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from regularized.compression.low_precision.blocking import padded
from regularized.compression.low_precision.rounding import Overflow, Rounder, Rounding

__all__ = ["Encoded", "Format", "Limit", "pack_nibbles", "unpack_nibbles"]

Limit: TypeAlias = Tensor | float


class Encoded(NamedTuple):
    """A tensor in a format: what would be stored.

    Attributes:
        codes: an integer for each value, in the shape of the values: uint8 up to 8 bits, else int16.
        scales: what else belongs to it, in the form of the format; codes too where the format rounds its scales.
    """

    codes: Tensor
    scales: tuple[Tensor, ...] = ()


class Format(ABC):
    """A number format. Formats are values: frozen, hashable, equal where they mean the same.

    A subclass defines ``_quantize``, ``limit``, ``bits`` and a ``name``; where the format can be stored, also
    ``_encode`` and ``_decode``.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is called in tables."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits that a value takes, its share of the scales included; scales of rows and tensors weigh nothing."""

    @property
    def needs_axis(self) -> bool:
        """Whether the axis matters: False where a tensor quantized once serves both of its products."""
        return True

    @property
    def smallest_block(self) -> int:
        """A multiple of it is a length that ``encode`` takes without padding; default 1."""
        return 1

    @abstractmethod
    def _quantize(self, x: Tensor, axis: int, rounder: Rounder) -> Tensor:
        """Values of the format; ``x`` is float32 or float64, not empty, and stays as it is."""

    @abstractmethod
    def limit(self, x: Tensor, *, axis: int = -1) -> Limit:
        """The largest magnitude that each entry's block can hold: what is above is saturated.

        Args:
            x: the tensor before quantization; float32 or float64.
            axis: along which blocks lie.

        Returns:
            A number, or a tensor of the shape of ``x``.
        """

    def _encode(self, x: Tensor, axis: int, rounder: Rounder) -> Encoded:
        raise TypeError(f"{self.name} is a grid of values without codes: it can be quantized to, not encoded")

    def _decode(self, encoded: Encoded, axis: int) -> Tensor:
        raise TypeError(f"{self.name} is a grid of values without codes: there is nothing to decode")

    def quantize(
        self,
        x: Tensor,
        *,
        axis: int = -1,
        rounding: Rounding = "nearest_even",
        overflow: Overflow = "saturate",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The values of the format that stand for ``x``, in the type of ``x``: "fake" quantization.

        The arithmetic is in float32, or float64 for float64: directly from there, never through a third type. A result
        that a half-precision ``x`` cannot hold is rounded to its type at the end.

        Args:
            x: any shape; float16, bfloat16, float32 or float64.
            axis: along which blocks and rows lie; in a product the axis that is summed over. Default the last.
            rounding: ``"nearest_even"`` (default, OCP and IEEE), ``"nearest_away"``, ``"toward_zero"`` or
                ``"stochastic"``.
            overflow: what becomes of values above the largest: ``"saturate"`` (default), ``"inf"`` or ``"nan"``. NaN
                stays NaN whatever the rule.
            generator: for stochastic rounding; default torch's global one.

        Raises:
            TypeError: ``x`` is not of a floating type.
            ValueError: the format has no infinity or NaN to overflow to.

        Examples:
            >>> from regularized.compression.low_precision.elements import element
            >>> element("e4m3").quantize(torch.tensor([0.3, 500.0, float("nan")])).tolist()
            [0.3125, 448.0, nan]
        """
        return self.rounded(x, Rounder(rounding, overflow, generator), axis=axis)

    def rounded(self, x: Tensor, rounder: Rounder, *, axis: int = -1) -> Tensor:
        """:meth:`quantize` with rounding, overflow and generator as one object."""
        work = _working(x)
        return x.clone() if x.numel() == 0 else self._quantize(work, axis, rounder).to(x.dtype)

    def encode(
        self,
        x: Tensor,
        *,
        axis: int = -1,
        rounding: Rounding = "nearest_even",
        overflow: Overflow = "saturate",
        generator: torch.Generator | None = None,
        pad: bool = False,
    ) -> Encoded:
        """Codes and scales: what would be stored. :meth:`decode` gives exactly what :meth:`quantize` gives.

        Args:
            x: as in :meth:`quantize`.
            axis: as there.
            rounding: as there.
            overflow: as there.
            generator: as there.
            pad: add zeros where the length is no multiple of the block; the codes have the longer shape then. Default
                False.

        Raises:
            TypeError: ``x`` is not of a floating type, or the format has no codes.
            ValueError: a length that is no multiple of the block without ``pad``; or a NaN that the format has no code
                for.

        Examples:
            >>> from regularized.compression.low_precision.blocks import MX
            >>> codes, (scales,) = MX("e2m1", block=4).encode(torch.tensor([0.0, 1.0, -3.0, 7.0]))
            >>> codes.tolist(), scales.tolist()
            ([0, 2, 13, 7], [[127]])
        """
        work = _working(x)
        missing = -x.shape[axis] % self.smallest_block if x.ndim else 0
        if missing and not pad:
            raise ValueError(
                f"{self.name} stores blocks of {self.smallest_block}, and axis {axis} has {x.shape[axis]} entries; "
                f"give a multiple, or pad=True for {missing} zeros more"
            )
        if missing:
            work = padded(work, self.smallest_block, axis)
        return self._encode(work, axis, Rounder(rounding, overflow, generator))

    def decode(self, encoded: Encoded | tuple[Tensor, tuple[Tensor, ...]], *, axis: int = -1) -> Tensor:
        """The values that codes and scales stand for, float32 (float64 where the scales are).

        Args:
            encoded: from :meth:`encode`, or a pair of codes and scales.
            axis: as there.

        Raises:
            TypeError: the format has no codes.
        """
        return self._decode(Encoded(*encoded), axis)

    def __str__(self) -> str:
        return self.name


def _working(x: Tensor) -> Tensor:
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise TypeError(
            f"a number format takes float16, bfloat16, float32 or float64, got {x.dtype}; convert it first, such as by "
            "x.float()"
        )
    return x.float() if x.dtype.itemsize == 2 else x


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first of each pair in the lower half, as torch and ml_dtypes have it.

    Args:
        codes: uint8 below 16; any shape, flattened; an odd one out gets a zero beside it.

    Returns:
        (ceil(n / 2),) uint8.

    Examples:
        >>> pack_nibbles(torch.tensor([1, 2, 15], dtype=torch.uint8)).tolist()
        [33, 15]
    """
    flat = codes.flatten()
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return flat[0::2] | (flat[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The first ``count`` codes of what :func:`pack_nibbles` has packed, (count,) uint8.

    Args:
        packed: (n,) uint8.
        count: at most 2 n.

    Examples:
        >>> unpack_nibbles(torch.tensor([33, 15], dtype=torch.uint8), 3).tolist()
        [1, 2, 15]
    """
    return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count]
