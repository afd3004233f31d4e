"""Products of rounded operands: emulated sums in few bits, exact integer products, and the hardware's own kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from regularized.compression.low_precision.blocks import Scaled
from regularized.compression.low_precision.elements import Element, FixedPoint, element
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.rounding import Rounder
from regularized.mechanisms.ranges import count

__all__ = ["Accumulator", "hardware_product", "integer_product", "why_not_hardware"]

_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A sum in few bits: each chunk of it in float32, rounded, then added to what there is, rounded again.

    Args:
        form: an element format or its name; default ``"fp16"``.
        chunk: products that are summed before rounding; default 64, of training in FP8 in 2018 (Wang et al.).

    Examples:
        >>> a = torch.full((1, 4096), 1.0)
        >>> [Accumulator("fp16", chunk).product(a, a.T).item() for chunk in (1, 64)]  # 2048 + 1 is 2048 in fp16
        [2048.0, 4096.0]
    """

    form: Element | str = "fp16"
    chunk: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.form, str):
            object.__setattr__(self, "form", element(self.form))
        count(1)("chunk", self.chunk)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b with rounded sums.

        Args:
            a: (n, k) float32.
            b: (k, m) float32.
        """
        assert isinstance(self.form, Element)
        rounder = Rounder()
        total = a.new_zeros(a.shape[0], b.shape[1])
        for left, right in zip(a.split(self.chunk, dim=1), b.split(self.chunk, dim=0)):
            total = self.form.cast(total + self.form.cast(left @ right, rounder), rounder)
        return total


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two int8 matrices, int32: exact up to k = 2^31 / 127^2, some 133,000.

    ``torch._int_mm`` where it takes the sizes (a GPU wants multiples of 8 and more than 16 rows), else float64, whose
    53 bits hold every such sum.

    Args:
        a: (n, k) int8.
        b: (k, m) int8.

    Examples:
        >>> a = torch.full((2, 3), 127, dtype=torch.int8)
        >>> integer_product(a, a.T).tolist()
        [[48387, 48387], [48387, 48387]]
    """
    fits = a.device.type == "cpu" or (a.shape[0] > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0)
    if fits:
        return torch._int_mm(a, b)
    return (a.double() @ b.double()).int()


def why_not_hardware(left: Format | None, right: Format | None, device: torch.device) -> str:
    """Why a device cannot compute a product itself; empty where it can.

    Args:
        left: the left operand's format.
        right: the right operand's.
        device: where.

    Examples:
        >>> why_not_hardware(Scaled("e4m3"), Scaled("e4m3"), torch.device("cpu"))
        ''
        >>> why_not_hardware(Scaled("e4m3"), Scaled("int8"), torch.device("cpu"))
        'its operands are neither both FP8 nor both INT8, with a scale for a tensor or row each'
    """
    forms = [form for form in (left, right) if isinstance(form, Scaled) and form.granularity in ("tensor", "row")]
    names = {form.elements.name for form in forms}
    if len(forms) < 2 or not (names <= _FP8.keys() or names == {"int8"}):
        return "its operands are neither both FP8 nor both INT8, with a scale for a tensor or row each"
    if names == {"int8"}:
        return ""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 9):
            return "FP8 needs a GPU of compute capability 8.9 (Ada, Hopper) or newer"
        if names == {"float8_e5m2"}:
            return "the hardware multiplies E4M3 by E4M3 or E5M2, not E5M2 by E5M2"
        if forms[0].granularity != forms[1].granularity:
            return "the hardware takes a scale for each tensor or for each row, not one of each"
    elif forms[0].granularity == "row" or forms[1].granularity == "row":
        return f"torch multiplies FP8 on {device.type} with a scale for each tensor alone"
    return ""


def hardware_product(a: Tensor, left: Scaled, b: Tensor, right: Scaled) -> Tensor:
    """a b^T by the device's kernel for the formats: ``torch._scaled_mm`` or ``torch._int_mm``. Float32.

    The operands are rounded exactly as by the formats; the kernel then sums products of codes, in float32 (FP8) or
    exactly (INT8). On a GPU sizes must be multiples of 16 for FP8.

    Args:
        a: (n, k) float32.
        left: its format, see :func:`why_not_hardware`.
        b: (m, k) float32.
        right: its format.

    Examples:
        >>> a, b = torch.randn(32, 64), torch.randn(16, 64)
        >>> form = Scaled("int8", "row")
        >>> real, emulated = hardware_product(a, form, b, form), form.quantize(a) @ form.quantize(b).T
        >>> bool(torch.allclose(real, emulated, atol=1e-4))
        True
    """
    rounder = Rounder()
    values, scales = [], []
    for x, form in ((a, left), (b, right)):
        axes = (0, 1) if form.granularity == "tensor" else (1,)
        scale = form.scales(x.abs().amax(axes, keepdim=True))
        values.append(form.elements.cast(x / scale, rounder))
        scales.append(scale)
    if isinstance(left.elements, FixedPoint):
        whole = integer_product(values[0].to(torch.int8), values[1].to(torch.int8).T)
        return whole.float() * scales[0] * scales[1].T
    codes = [v.to(_FP8[form.elements.name]) for v, form in zip(values, (left, right))]  # exact: they are on the grid
    tensorwise = left.granularity == "tensor"
    first, second = (s.reshape(()) if tensorwise else s.contiguous() for s in (scales[0], scales[1].T))
    dtype = torch.float32 if tensorwise else torch.bfloat16  # a kernel with scales for rows gives bfloat16 alone
    return torch._scaled_mm(codes[0], codes[1].t(), first, second, out_dtype=dtype).float()
