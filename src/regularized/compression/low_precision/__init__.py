"""Low-Precision Training of Large Language Models: number formats, recipes and optimizers of few bits, bit for bit."""

from regularized.compression.low_precision.blocks import MX, NVFP4, BlockFloat, Scaled
from regularized.compression.low_precision.codebook import (
    Codebook,
    dynamic_tree,
    evenly_above_zero,
    float_sd,
    logarithmic,
    posit,
    powers_of_two,
)
from regularized.compression.low_precision.convert import convert, to_plain
from regularized.compression.low_precision.delayed import Delayed
from regularized.compression.low_precision.elements import FixedPoint, FloatFormat, PowerOfTwo, element
from regularized.compression.low_precision.feedback import ErrorFeedback, qsgd
from regularized.compression.low_precision.formats import Encoded, Format, pack_nibbles, unpack_nibbles
from regularized.compression.low_precision.grids import (
    Affine,
    Binary,
    DoReFa,
    DynamicFixedPoint,
    FallBack,
    ShiftedSqueezed,
    Ternary,
)
from regularized.compression.low_precision.hadamard import hadamard, random_signs
from regularized.compression.low_precision.layer import LowPrecisionLinear
from regularized.compression.low_precision.loss_scaling import LossScaler
from regularized.compression.low_precision.named import NAMED, as_format, decode, encode, quantize
from regularized.compression.low_precision.optimizer import (
    STATE_FORMATS,
    LowPrecisionOptimizer,
    StateFormat,
    join_float32,
    split_float32,
)
from regularized.compression.low_precision.products import Accumulator, hardware_product, integer_product
from regularized.compression.low_precision.recipe import (
    RECIPES,
    Operand,
    Product,
    Recipe,
    bitnet,
    deepseek_v3,
    fp8_hybrid,
    int4_hadamard,
    jetfire,
    mxfp4,
    mxfp8,
    nvfp4,
    uniform,
)
from regularized.compression.low_precision.rounding import Rounder, drop_bits, round_to_integers
from regularized.compression.low_precision.statistics import Losses, losses_of, watch
from regularized.compression.low_precision.straight_through import LearnedStep, fake_quantize
from regularized.compression.low_precision.term import LowPrecision

__all__ = [
    "MX",
    "NAMED",
    "NVFP4",
    "RECIPES",
    "STATE_FORMATS",
    "Accumulator",
    "Affine",
    "Binary",
    "BlockFloat",
    "Codebook",
    "Delayed",
    "DoReFa",
    "DynamicFixedPoint",
    "Encoded",
    "ErrorFeedback",
    "FallBack",
    "FixedPoint",
    "FloatFormat",
    "Format",
    "LearnedStep",
    "LossScaler",
    "Losses",
    "LowPrecision",
    "LowPrecisionLinear",
    "LowPrecisionOptimizer",
    "Operand",
    "PowerOfTwo",
    "Product",
    "Recipe",
    "Rounder",
    "Scaled",
    "ShiftedSqueezed",
    "StateFormat",
    "Ternary",
    "as_format",
    "bitnet",
    "convert",
    "decode",
    "deepseek_v3",
    "drop_bits",
    "dynamic_tree",
    "element",
    "encode",
    "evenly_above_zero",
    "fake_quantize",
    "float_sd",
    "fp8_hybrid",
    "hadamard",
    "hardware_product",
    "int4_hadamard",
    "integer_product",
    "jetfire",
    "join_float32",
    "logarithmic",
    "losses_of",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "pack_nibbles",
    "posit",
    "powers_of_two",
    "qsgd",
    "quantize",
    "random_signs",
    "round_to_integers",
    "split_float32",
    "to_plain",
    "uniform",
    "unpack_nibbles",
    "watch",
]
