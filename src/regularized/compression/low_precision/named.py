"""Formats by their names, and the three functions that are all one needs: quantize, encode, decode."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from regularized.compression.low_precision.blocks import MX, NVFP4, BlockFloat, Scaled
from regularized.compression.low_precision.codebook import float_sd, logarithmic, posit, powers_of_two
from regularized.compression.low_precision.elements import ELEMENTS, element
from regularized.compression.low_precision.formats import Encoded, Format
from regularized.compression.low_precision.grids import (
    Affine,
    Binary,
    DoReFa,
    DynamicFixedPoint,
    ShiftedSqueezed,
    Ternary,
)
from regularized.compression.low_precision.rounding import Overflow, Rounding
from regularized.mechanisms.surgery import close_names

__all__ = ["NAMED", "as_format", "decode", "encode", "quantize"]

NAMED: Mapping[str, Format] = MappingProxyType(
    {
        **{name: form for name, form in ELEMENTS.items() if not name.startswith("int")},
        "int8": Scaled("int8"),
        "int4": Scaled("int4"),
        "int8_row": Scaled("int8", "row"),
        "int8_tile32": Scaled("int8", (32, 32)),
        "uint8": Affine(8),
        "fp8_e4m3": Scaled("e4m3"),
        "fp8_e5m2": Scaled("e5m2"),
        "fp8_row": Scaled("e4m3", "row"),
        "fp8_tile128": Scaled("e4m3", (1, 128)),
        "fp8_block128": Scaled("e4m3", (128, 128)),
        "mxfp8_e4m3": MX("e4m3"),
        "mxfp8_e5m2": MX("e5m2"),
        "mxfp6_e3m2": MX("e3m2"),
        "mxfp6_e2m3": MX("e2m3"),
        "mxfp4": MX("e2m1"),
        "mxint8": MX("int8"),
        "nvfp4": NVFP4(),
        "bfp8": BlockFloat(8),
        "flexpoint16": BlockFloat(16, "tensor"),
        "dynamic_fixed8": DynamicFixedPoint(8),
        "posit8": Scaled(posit(8, 1), onto=4.0),
        "log8": Scaled(logarithmic(8, 3)),
        "floatsd8": Scaled(float_sd()),
        "pow2_4": Scaled(powers_of_two(4), "row"),
        "s2fp8": ShiftedSqueezed(),
        "dorefa4": DoReFa(4),
        "ternary": Ternary(),
        "binary": Binary("row"),
    }
)
"""Usual formats; any other is made from its class, such as ``MX("e4m3", scale="rceil")``."""


def as_format(form: Format | str) -> Format:
    """A format, or the one of a name: those of :data:`NAMED`, and the short ones of elements such as ``"e4m3"``.

    Raises:
        ValueError: there is none of that name; those that there are stand in the message.

    Examples:
        >>> as_format("mxfp4").bits, as_format("bf16").bits
        (4.25, 16.0)
    """
    if isinstance(form, Format):
        return form
    if form in NAMED:
        return NAMED[form]
    try:
        return element(form)
    except ValueError:
        raise ValueError(
            f"there is no format {form!r}; {close_names([form], NAMED)}. All: {', '.join(NAMED)}"
        ) from None


def quantize(
    x: Tensor,
    form: Format | str,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The values of a format that stand for a tensor, in its own type: see :meth:`Format.quantize`.

    Args:
        x: float16, bfloat16, float32 or float64.
        form: the format, or its name.
        axis: along which blocks and rows lie; default the last.
        rounding: ``"nearest_even"`` (default), ``"nearest_away"``, ``"toward_zero"`` or ``"stochastic"``.
        overflow: ``"saturate"`` (default), ``"inf"`` or ``"nan"``.
        generator: for stochastic rounding; default torch's global one.

    Raises:
        TypeError: ``x`` is not of a floating type.
        ValueError: no such format, rounding or overflow; the format has no infinity or NaN to overflow to.

    Examples:
        >>> quantize(torch.tensor([0.3, 5.1]), "mxfp4"), quantize(torch.tensor([0.3, 5.1]), "fp16")
        (tensor([0.5000, 6.0000]), tensor([0.3000, 5.1016]))
    """
    return as_format(form).quantize(x, axis=axis, rounding=rounding, overflow=overflow, generator=generator)


def encode(
    x: Tensor,
    form: Format | str,
    *,
    axis: int = -1,
    rounding: Rounding = "nearest_even",
    overflow: Overflow = "saturate",
    generator: torch.Generator | None = None,
    pad: bool = False,
) -> Encoded:
    """Codes and scales of a tensor: see :meth:`Format.encode`.

    Args:
        x: as for :func:`quantize`.
        form: as there.
        axis: as there.
        rounding: as there.
        overflow: as there.
        generator: as there.
        pad: add zeros where a length is no multiple of the block.

    Raises:
        TypeError: ``x`` is not of a floating type, or the format has no codes.
        ValueError: as for :func:`quantize`; or a length that is no multiple of the block, without ``pad``.

    Examples:
        >>> codes, scales = encode(torch.tensor([0.3, 5.1]), "e5m2")
        >>> codes.tolist(), scales
        ([53, 69], ())
    """
    form = as_format(form)
    return form.encode(x, axis=axis, rounding=rounding, overflow=overflow, generator=generator, pad=pad)


def decode(encoded: Encoded | tuple[Tensor, tuple[Tensor, ...]], form: Format | str, *, axis: int = -1) -> Tensor:
    """The values of what :func:`encode` has given, float32.

    Args:
        encoded: codes and scales.
        form: the format.
        axis: as for :func:`encode`.

    Examples:
        >>> decode(encode(torch.tensor([0.3, 5.1]), "e5m2"), "e5m2")
        tensor([0.3125, 5.0000])
    """
    return as_format(form).decode(encoded, axis=axis)
