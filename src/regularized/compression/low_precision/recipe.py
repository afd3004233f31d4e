"""Recipes: which format each operand of a linear layer's three products has.

======================  =========================  ==========================  =============================
product                 is                         left operand                right operand
======================  =========================  ==========================  =============================
``forward``             y = Q(x) Q(w)^T            the input x                 the weight w
``input_gradient``      dx = Q(g) Q(w)             the output's gradient g     the weight w
``weight_gradient``     dw = Q(g)^T Q(x)           the output's gradient g     the input x
======================  =========================  ==========================  =============================

Q rounds along the axis that the product sums over: x and w along the features in the forward product, w along the
outputs in the second, g and x along the tokens in the third. Gradients pass through Q as through the identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from regularized.compression.low_precision.blocks import MX, NVFP4, Scaled, ScaleRule
from regularized.compression.low_precision.delayed import Delayed
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.grids import Ternary
from regularized.compression.low_precision.hadamard import check_hadamard_block
from regularized.compression.low_precision.named import as_format
from regularized.compression.low_precision.products import Accumulator
from regularized.compression.low_precision.rounding import OVERFLOWS, ROUNDINGS, Overflow, Rounding
from regularized.mechanisms.ranges import Choice

__all__ = [
    "RECIPES",
    "Operand",
    "Product",
    "Recipe",
    "Rotation",
    "bitnet",
    "deepseek_v3",
    "fp8_hybrid",
    "int4_hadamard",
    "jetfire",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "uniform",
]

Rotation: TypeAlias = Literal["deterministic", "random"]


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a product.

    Args:
        form: its format or the name of one; default None: as it is.
        rounding: default ``"nearest_even"``. In evaluation mode what is stochastic is rounded to nearest.
        overflow: default ``"saturate"``.
        reuse: take the values that the forward product had, as quantization-aware training does; default False:
            round again along this product's axis.

    Raises:
        ValueError: no such format, rounding or overflow; or ``reuse`` together with a format.

    Examples:
        >>> Operand("e5m2", "stochastic").form.name
        'float8_e5m2'
    """

    form: Format | None = None
    rounding: Rounding = "nearest_even"
    overflow: Overflow = "saturate"
    reuse: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.form, str):
            object.__setattr__(self, "form", as_format(self.form))
        ROUNDINGS("rounding", self.rounding)
        OVERFLOWS("overflow", self.overflow)
        if self.reuse and self.form is not None:
            raise ValueError("reuse=True takes the forward product's values; leave the format out")

    def __str__(self) -> str:
        if self.reuse:
            return "as forward"
        if self.form is None:
            return "full"
        return self.form.name + (" SR" if self.rounding == "stochastic" else "")


@dataclass(frozen=True, slots=True)
class Product:
    """One of the three products.

    Args:
        left: see the module; default as it is.
        right: see the module; default as it is.
        rotation: rotate both operands by Hadamard blocks along the axis that is summed over: ``"deterministic"``,
            ``"random"`` (signs drawn anew for every product), or None (default).
        rotation_block: default 64 (from memory, of training in MXFP4).
        accumulator: how partial sums are rounded; default None: float32 throughout.

    Raises:
        ValueError: a block that is no power of two; a rotation of operands that are full.

    Examples:
        >>> product = Product(Operand("mxfp4", "stochastic"), Operand("mxfp4"), rotation="random")
        >>> print(product)
        mxfp4_e2m1 SR x mxfp4_e2m1, random Hadamard
    """

    left: Operand = field(default_factory=Operand)
    right: Operand = field(default_factory=Operand)
    rotation: Rotation | None = None
    rotation_block: int = 64
    accumulator: Accumulator | None = None

    def __post_init__(self) -> None:
        if self.rotation is not None:
            Choice("deterministic", "random")("rotation", self.rotation)
            if self.left.reuse or self.right.reuse:
                raise ValueError("a product that reuses the forward product's values cannot rotate them again")
        check_hadamard_block(self.rotation_block)

    @property
    def is_full(self) -> bool:
        """Whether it is the plain product."""
        operands = (self.left, self.right)
        return self.accumulator is None and all(o.form is None and not o.reuse for o in operands)

    def __str__(self) -> str:
        rotation = "" if self.rotation is None else f", {self.rotation} Hadamard"
        return f"{self.left} x {self.right}{rotation}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """The formats of a linear layer's three products.

    Args:
        name: for tables.
        forward: see the module; default full precision.
        input_gradient: see the module; default full precision.
        weight_gradient: see the module; default full precision.
        hardware: compute products by the device's own kernels (``torch._scaled_mm`` for FP8, ``torch._int_mm`` for
            INT8) instead of emulating them; default False. What a device cannot do is an error at the first call.

    Examples:
        >>> e4m3 = Operand("mxfp8_e4m3")
        >>> recipe = Recipe("forward only", forward=Product(e4m3, e4m3))
        >>> recipe.input_gradient.is_full
        True
    """

    name: str
    forward: Product = field(default_factory=Product)
    input_gradient: Product = field(default_factory=Product)
    weight_gradient: Product = field(default_factory=Product)
    hardware: bool = False

    def __post_init__(self) -> None:
        if self.forward.left.reuse or self.forward.right.reuse:
            raise ValueError("the forward product has nothing to reuse; give its operands formats")
        if self.input_gradient.left.reuse or self.weight_gradient.left.reuse:
            raise ValueError("the output's gradient is not in the forward product; give it a format")

    @property
    def products(self) -> Mapping[str, Product]:
        """The three by name."""
        return {
            "forward": self.forward,
            "input_gradient": self.input_gradient,
            "weight_gradient": self.weight_gradient,
        }

    @property
    def is_full(self) -> bool:
        """Whether it is plain training."""
        return all(product.is_full for product in self.products.values())

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return any(
            product.rotation == "random" or "stochastic" in (product.left.rounding, product.right.rounding)
            for product in self.products.values()
        )

    @property
    def fewest_bits(self) -> float:
        """Bits of a value in the narrowest of its formats; 32 where all are full."""
        forms = [o.form for p in self.products.values() for o in (p.left, p.right) if o.form is not None]
        return min((form.bits for form in forms), default=32.0)


def uniform(form: Format | str, rounding: Rounding = "nearest_even", *, name: str = "") -> Recipe:
    """The same format for all six operands.

    Args:
        form: a format or the name of one.
        rounding: default to nearest, ties to even.
        name: default the format's.

    Examples:
        >>> print(uniform("posit8").forward)
        posit8es1 / a tensor x posit8es1 / a tensor
    """
    operand = Operand(as_format(form), rounding)
    product = Product(operand, operand)
    return Recipe(name or str(operand), product, product, product)


def fp8_hybrid(scaling: Literal["current", "delayed"] = "current", *, hardware: bool = False) -> Recipe:
    """E4M3 in the forward product, E5M2 for gradients (HFP8; Transformer Engine's HYBRID), one scale a tensor.

    Args:
        scaling: ``"current"`` (default) or ``"delayed"``: the scale comes from the last 1,024 steps.
        hardware: see :class:`Recipe`; with current scaling.

    Examples:
        >>> print(fp8_hybrid().weight_gradient)
        float8_e5m2 / a tensor x float8_e4m3fn / a tensor
    """
    Choice("current", "delayed")("scaling", scaling)
    if hardware and scaling == "delayed":
        raise ValueError('hardware=True takes scaling="current"; delayed scaling is emulated')
    make = Scaled if scaling == "current" else Delayed
    values, gradients = Operand(make("e4m3")), Operand(make("e5m2"))
    backward = Product(gradients, values)
    return Recipe(f"fp8 hybrid, {scaling}", Product(values, values), backward, backward, hardware)


def deepseek_v3() -> Recipe:
    """DeepSeek-V3: E4M3 throughout, scales for 128 values of an input or gradient, and for 128 x 128 of a weight.

    Examples:
        >>> print(deepseek_v3().forward)
        float8_e4m3fn / 128 x float8_e4m3fn / 128 x 128
    """
    values, weight = Operand(Scaled("e4m3", 128)), Operand(Scaled("e4m3", (128, 128)))
    return Recipe("deepseek v3", Product(values, weight), Product(values, weight), Product(values, values))


def mxfp8(gradient: Literal["e4m3", "e5m2"] = "e4m3", *, scale: ScaleRule = "rceil", block: int = 32) -> Recipe:
    """MXFP8 in all three products, each operand in blocks along the axis that is summed over.

    Args:
        gradient: the elements of gradients; default ``"e4m3"`` like the rest.
        scale: default ``"rceil"``, which cuts nothing; ``"floor"`` is the specification's.
        block: default 32.

    Examples:
        >>> print(mxfp8("e5m2").input_gradient)
        mxfp8_e5m2 rceil x mxfp8_e4m3 rceil
    """
    values, gradients = (Operand(MX(form, block=block, scale=scale)) for form in ("e4m3", gradient))
    backward = Product(gradients, values)
    return Recipe(f"mxfp8, gradients {gradient}, {scale}", Product(values, values), backward, backward)


def mxfp4(
    *,
    rounding: Rounding = "nearest_even",
    rotation: Rotation | None = None,
    weight_gradient: Literal["mxfp4", "full"] = "mxfp4",
    scale: ScaleRule = "rceil",
    rotation_block: int = 64,
) -> Recipe:
    """MXFP4 (E2M1 in blocks of 32) in the three products.

    Args:
        rounding: of the gradients' operands; default to nearest. ``"stochastic"`` with ``rotation="random"`` is the
            recipe of training in MXFP4 (Tseng et al. 2025).
        rotation: of the two backward products, see :mod:`~regularized.compression.low_precision.hadamard`.
        weight_gradient: ``"full"`` leaves the third product alone, the one that arXiv 2605.09825 finds unstable.
        scale: default ``"rceil"``.
        rotation_block: default 64 (from memory).

    Examples:
        >>> print(mxfp4(rounding="stochastic", rotation="random").weight_gradient)
        mxfp4_e2m1 rceil SR x mxfp4_e2m1 rceil SR, random Hadamard
    """
    Choice("mxfp4", "full")("weight_gradient", weight_gradient)
    form = MX("e2m1", scale=scale)
    nearest, gradients = Operand(form), Operand(form, rounding)
    backward = Product(gradients, gradients, rotation, rotation_block)
    third = Product() if weight_gradient == "full" else backward
    words = [rounding.replace("_even", ""), *([f"{rotation} Hadamard"] if rotation else [])]
    last = ", weight gradient full" if weight_gradient == "full" else ""
    return Recipe(f"mxfp4, {', '.join(words)}{last}", Product(nearest, nearest), backward, third)


def nvfp4(*, rounding: Rounding = "stochastic", rotation: Rotation | None = "random") -> Recipe:
    """NVFP4 in the three products: NVIDIA's recipe in outline, with blocks of 1 x 16 for weights, too.

    Args:
        rounding: of the gradient; default stochastic.
        rotation: of the weight gradient's product, in blocks of 16; default with random signs.

    Examples:
        >>> print(nvfp4().weight_gradient)
        nvfp4 SR x nvfp4, random Hadamard
    """
    values, gradients = Operand(NVFP4()), Operand(NVFP4(), rounding)
    return Recipe(
        "nvfp4",
        Product(values, values),
        Product(gradients, values),
        Product(gradients, values, rotation, 16),
    )


def jetfire() -> Recipe:
    """Jetfire: INT8 in tiles of 32 x 32, so that one quantization serves both products of a tensor.

    Examples:
        >>> jetfire().forward.left.form.name
        'int8 / 32 x 32'
    """
    return uniform(Scaled("int8", (32, 32)), name="jetfire")


def int4_hadamard() -> Recipe:
    """4-bit integers for every operand, rotated, gradients rounded stochastically (after Xi et al. 2023).

    Its learned steps and its sampling of gradient rows are not part of it.

    Examples:
        >>> print(int4_hadamard().forward)
        int4 / a row x int4 / a row, deterministic Hadamard
    """
    row = Scaled("int4", "row")
    nearest, gradients = Operand(row), Operand(row, "stochastic")
    backward = Product(gradients, nearest, "deterministic", 32)
    return Recipe("int4 hadamard", Product(nearest, nearest, "deterministic", 32), backward, backward)


def bitnet() -> Recipe:
    """BitNet b1.58: ternary weights, INT8 inputs with a scale a token; the backward products are full.

    Examples:
        >>> print(bitnet().input_gradient)
        full x as forward
    """
    again = Product(Operand(), Operand(reuse=True))
    return Recipe("bitnet b1.58", Product(Operand(Scaled("int8", "row")), Operand(Ternary())), again, again)


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "full": Recipe("full"),
        "bf16": uniform("bf16"),
        "fp16": uniform("fp16"),
        "tf32": uniform("tf32"),
        "fp8_hybrid": fp8_hybrid(),
        "fp8_delayed": fp8_hybrid("delayed"),
        "deepseek_v3": deepseek_v3(),
        "mxfp8": mxfp8(),
        "mxfp8_e5m2": mxfp8("e5m2"),
        "mxfp6": uniform(MX("e3m2", scale="rceil"), name="mxfp6"),
        "mxint8": uniform("mxint8"),
        "mxfp4": mxfp4(),
        "mxfp4_random": mxfp4(rounding="stochastic", rotation="random"),
        "mxfp4_deterministic": mxfp4(rotation="deterministic"),
        "nvfp4": nvfp4(),
        "int8": uniform("int8_row", name="int8"),
        "jetfire": jetfire(),
        "int4_hadamard": int4_hadamard(),
        "flexpoint16": uniform("flexpoint16"),
        "posit8": uniform("posit8"),
        "log8": uniform("log8"),
        "floatsd8": uniform("floatsd8"),
        "s2fp8": uniform("s2fp8"),
        "bitnet": bitnet(),
    }
)
"""Ready-made ones by name."""
