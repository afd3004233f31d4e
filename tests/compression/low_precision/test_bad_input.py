"""Bad inputs of `low_precision`: each is answered by what was given, what is allowed, and how to mend it."""

import dataclasses
import math

import pytest
import torch
from tests.bad_input import assert_refused, refused
from torch import nn

from regularized.compression.low_precision.blocks import MX, NVFP4, Scaled
from regularized.compression.low_precision.codebook import Codebook, dynamic_tree, posit
from regularized.compression.low_precision.convert import convert
from regularized.compression.low_precision.elements import element
from regularized.compression.low_precision.feedback import qsgd
from regularized.compression.low_precision.grids import Ternary
from regularized.compression.low_precision.hadamard import hadamard
from regularized.compression.low_precision.layer import LowPrecisionLinear
from regularized.compression.low_precision.loss_scaling import LossScaler
from regularized.compression.low_precision.named import as_format, quantize
from regularized.compression.low_precision.optimizer import LowPrecisionOptimizer
from regularized.compression.low_precision.recipe import RECIPES, Operand, Product, Recipe, fp8_hybrid
from regularized.compression.low_precision.rounding import Rounder
from regularized.compression.low_precision.statistics import watch

ONE = torch.ones(1)


def network():
    """An embedding, a norm, two linear layers and a head."""
    return nn.Sequential(
        nn.Embedding(8, 32), nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 5)
    )


def sgd(weight, **options):
    return LowPrecisionOptimizer(torch.optim.SGD([nn.Parameter(weight)], lr=1.0), **options)


def unscale(dtype):
    """One step under loss scaling with gradients of this type."""
    weight = nn.Parameter(torch.zeros(2, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    LossScaler(scale=4.0).step(torch.optim.SGD([weight], lr=1.0))


def on_this_hardware(recipe):
    layer = LowPrecisionLinear.of(nn.Linear(96, 64), dataclasses.replace(recipe, hardware=True))
    layer(torch.ones(4, 96))


def _draws_are_lost():
    layer = LowPrecisionLinear.of(nn.Linear(96, 64), RECIPES["mxfp4_random"])
    state = layer.state_dict()
    del state["draws"]
    layer.load_state_dict(state)


def _nan_under_a_strict_watch():
    model = network()
    convert(model, "mxfp8")
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with watch(model, strict=True):
        model(torch.zeros(2, 2, dtype=torch.long))


def _nothing_to_watch():
    with watch(network()):
        pass


def formats():
    fp8, fp4 = element("e4m3"), element("e2m1")
    return [
        refused("unknown format", lambda: as_format("mxfp5"), ValueError, ("'mxfp5'", "mxfp8", "nvfp4", "int8")),
        refused("unknown element", lambda: element("e4m4"), ValueError, ("no element format 'e4m4'", "float8_e4m3fn")),
        refused("unknown form of a block", lambda: MX("e4m4"), ValueError, ("form must be 'e4m3'", "got 'e4m4'")),
        refused(
            "unknown scale rule",
            lambda: MX("e4m3", scale="round"),
            ValueError,
            ("scale must be 'floor', 'ceil', 'even' or 'rceil'", "round"),
        ),
        refused("empty blocks", lambda: MX("e4m3", block=0), ValueError, ("block must be", "0")),
        refused(
            "unknown granularity",
            lambda: Scaled("int8", "column"),
            ValueError,
            ('granularity must be "tensor", "row"', "column"),
        ),
        refused(
            "tiles of a vector",
            lambda: Scaled("int8", (2, 2)).quantize(torch.ones(4)),
            ValueError,
            ("a tile", "needs two axes"),
        ),
        refused(
            "axis not divisible by the block",
            lambda: MX("e4m3").encode(torch.ones(3, 70)),
            ValueError,
            ("blocks of 32", "axis -1 has 70 entries", "pad=True for 26 zeros"),
        ),
        *(
            refused(
                f"{wrong.dtype} input",
                lambda wrong=wrong: quantize(wrong, "mxfp8_e4m3"),
                TypeError,
                ("takes float16, bfloat16, float32 or float64", str(wrong.dtype)),
            )
            for wrong in (torch.arange(32), torch.zeros(32, dtype=torch.bool), torch.zeros(32, dtype=torch.cfloat))
        ),
        refused("infinity in E4M3", lambda: fp8.quantize(ONE, overflow="inf"), ValueError, ("has no infinity",)),
        refused("NaN in E2M1", lambda: fp4.quantize(ONE, overflow="nan"), ValueError, ("float4_e2m1fn has no NaN",)),
        refused("no code for NaN", lambda: fp4.encode(ONE * math.nan), ValueError, ("has no code for NaN",)),
        refused("no infinity in posits", lambda: posit(8).quantize(ONE, overflow="nan"), ValueError, ("NaN",)),
        refused(
            "NaN under a shared scale",
            lambda: Scaled("int8").encode(ONE * math.nan),
            ValueError,
            ("holds NaN or infinity, for which its scale has no code",),
        ),
        refused(
            "infinity under NVFP4's scales",
            lambda: NVFP4().encode(torch.full((16,), math.inf)),
            ValueError,
            ("holds NaN or infinity",),
        ),
        refused("float32 stores itself", lambda: element("tf32").encode(ONE), TypeError, ("kept as float32",)),
        refused("ternary codes", lambda: Ternary().encode(torch.ones(3)), TypeError, ("without codes",)),
        refused(
            "descending codebook",
            lambda: Codebook("x", (1.0, 0.0)),
            ValueError,
            ("numbers must be at least two, finite and ascending",),
        ),
        refused("decades of another tree", lambda: dynamic_tree(8, 3), ValueError, ("decades make",)),
        refused("posit of two bits", lambda: posit(2), ValueError, ("bits must be", "2")),
        refused(
            "unknown rounding",
            lambda: fp8.quantize(ONE, rounding="nearest"),
            ValueError,
            ("rounding must be 'nearest_even'", "'nearest'"),
        ),
        refused(
            "generator of another device",
            lambda: Rounder("stochastic", generator=torch.Generator()).integers(torch.ones(1, device="meta")),
            ValueError,
            ("generator is on cpu", "torch.Generator('meta')"),
        ),
    ]


def layers():
    return [
        refused("unknown format of an operand", lambda: Operand("mxfp5"), ValueError, ("there is no format 'mxfp5'",)),
        refused("a format and reuse", lambda: Operand("e4m3", reuse=True), ValueError, ("leave the format out",)),
        refused(
            "the first product reuses",
            lambda: Recipe("x", Product(Operand(reuse=True))),
            ValueError,
            ("nothing to reuse",),
        ),
        refused(
            "the gradient of the output is reused",
            lambda: Recipe("x", input_gradient=Product(Operand(reuse=True))),
            ValueError,
            ("output's gradient is not in the forward",),
        ),
        refused(
            "rotation of 24",
            lambda: Product(rotation="random", rotation_block=24),
            ValueError,
            ("must be a power of two, got 24",),
        ),
        refused(
            "unknown rotation",
            lambda: Product(rotation="both"),
            ValueError,
            ("rotation must be 'deterministic' or 'random'", "both"),
        ),
        refused(
            "Hadamard of 48",
            lambda: hadamard(torch.ones(48), block=48),
            ValueError,
            ("power of two, got 48", "nearest are 32 and 64"),
        ),
        refused(
            "signs of another block",
            lambda: hadamard(torch.ones(8), block=8, signs=torch.ones(4)),
            ValueError,
            ("needs 8 signs",),
        ),
        refused("a file without the draws", _draws_are_lost, RuntimeError, ("draws",)),
        refused(
            "hardware for emulated formats",
            lambda: on_this_hardware(RECIPES["mxfp8"]),
            ValueError,
            ("forward product", "own kernels: its operands are neither"),
        ),
        refused(
            "hardware that would have to draw",
            lambda: on_this_hardware(Recipe("drawn", *[Product(*[Operand("int8", "stochastic")] * 2)] * 3)),
            ValueError,
            ("not rounded to the nearest",),
        ),
        refused(
            "hardware with delayed scales",
            lambda: fp8_hybrid("delayed", hardware=True),
            ValueError,
            ('hardware=True takes scaling="current"',),
        ),
        refused("unknown recipe", lambda: convert(network(), "mxfp9"), ValueError, ("there is no recipe 'mxfp9'",)),
        refused(
            "a pattern that matches nothing",
            lambda: convert(network(), "mxfp8", include=["blocks.*"]),
            ValueError,
            ("include: no linear layer matches 'blocks.*'",),
        ),
        refused(
            "a pattern that is no list",
            lambda: convert(network(), "mxfp8", include="2"),
            ValueError,
            ("must be a list of patterns",),
        ),
        refused(
            "everything excluded",
            lambda: convert(network(), "mxfp8", exclude=["*"]),
            ValueError,
            ("has no linear layer to convert", "exclude=['*'] leaves none"),
        ),
        refused(
            "norms in four bits by a pattern",
            lambda: convert(nn.ModuleDict({"norm_a": nn.LayerNorm(4), "l": nn.Linear(4, 4)}), "mxfp4", include=["n*"]),
            ValueError,
            ("matches no linear layer, but LayerNorm", "whole names"),
        ),
        refused(
            "a layer that is read, not called",
            lambda: convert(nn.ModuleDict({"a": nn.MultiheadAttention(32, 2)}), "mxfp8"),
            ValueError,
            ("reads its weight instead of calling it",),
        ),
        refused("nothing to watch", _nothing_to_watch, ValueError, ("no converted layer to watch",)),
        refused(
            "NaN under a strict watch",
            _nan_under_a_strict_watch,
            FloatingPointError,
            ("layer '2', forward product, right operand",),
        ),
    ]


def optimizers():
    weight = torch.zeros(8, 8)
    return [
        refused(
            "an optimizer that looks at all parameters",
            lambda: LowPrecisionOptimizer(torch.optim.LBFGS([nn.Parameter(weight)])),
            TypeError,
            ("LBFGS looks at all parameters",),
        ),
        refused(
            "parameters for an optimizer",
            lambda: LowPrecisionOptimizer([nn.Parameter(weight)]),
            TypeError,
            ("must be a torch.optim.Optimizer, got list",),
        ),
        refused(
            "float16 masters",
            lambda: sgd(weight.half(), weights="fp16"),
            ValueError,
            ("a parameter is float16, which is no place to keep weights",),
        ),
        refused(
            "a bias in int4",
            lambda: sgd(torch.ones(3), weights="int4"),
            ValueError,
            ("would be rounded to int4", "weights=None"),
        ),
        refused(
            "a residual of float32",
            lambda: sgd(weight, weights="bf16_residual"),
            ValueError,
            ("is for bfloat16 parameters, got torch.float32",),
        ),
        refused(
            "unknown states",
            lambda: sgd(weight, states="2bit"),
            ValueError,
            ("states must be '8bit', '4bit' or 'fp8'", "2bit"),
        ),
        refused("scaling of float16 gradients", lambda: unscale(torch.float16), ValueError, ("a gradient is float16",)),
        refused(
            "scaling of bfloat16",
            lambda: unscale(torch.bfloat16),
            UserWarning,
            ("loss scaling does nothing for bfloat16", "leave it out"),
        ),
        refused("a scale of zero", lambda: LossScaler(scale=0.0), ValueError, ("scale must be positive",)),
        refused("no levels", lambda: qsgd(ONE, 0), ValueError, ("levels must be", "0")),
    ]


@pytest.mark.parametrize(("call", "error", "says"), [*formats(), *layers(), *optimizers()])
def test_bad_input(call, error, says):
    """Fails when one of them passes silently, or its message lacks what mends it."""
    assert_refused(call, error, says)


def test_zero_and_subnormal_blocks_are_no_error():
    """A block of zeros, or of the smallest subnormals, has a scale: never 0 / 0."""
    for x in (torch.zeros(64), torch.full((64,), 1e-45)):
        for name in ("mxfp8_e4m3", "mxfp4", "nvfp4", "int8"):
            assert bool(torch.isfinite(quantize(x, name)).all())


def test_draws_in_several_processes_and_under_compilation(monkeypatch):
    """Fails when copies of weights may drift apart silently, or a compiled graph draws the same numbers for ever."""
    monkeypatch.setattr("regularized.compression.low_precision.rounding.world_size", lambda: 2)
    drawn = {"rounding": "stochastic"}
    assert_refused(
        lambda: element("e4m3").quantize(torch.randn(4), **drawn), UserWarning, ("each draws its own numbers", "seed")
    )
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert_refused(
        lambda: element("e4m3").quantize(torch.randn(4), **drawn, generator=torch.Generator()),
        ValueError,
        ("cannot be compiled",),
    )
