"""Formats with shared scales: rules, axes, tails, exactness under powers of two, and what is not finite."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from regularized.compression.low_precision.blocks import MX, NVFP4, BlockFloat, Scaled, shared_exponents
from regularized.compression.low_precision.codebook import dynamic_tree
from regularized.compression.low_precision.elements import element
from regularized.compression.low_precision.formats import Format
from regularized.compression.low_precision.grids import Affine
from regularized.compression.low_precision.named import NAMED

FORMS = ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
RULES: tuple[Any, ...] = ("floor", "ceil", "even", "rceil")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal values over several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(3.0 * torch.randn(shape[:-1], generator=generator))[..., None]
    return torch.randn(shape, generator=generator) * scale


def by_hand(x: Tensor, form: MX) -> Tensor:
    """The specification's words in float64, value by value: no bit patterns, no tricks."""
    out = torch.empty_like(x)
    p = form.elements
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], 32):
            block = x[row, start : start + 32].double()
            amax = block.abs().max().item()
            k = -127
            if amax > 0:
                k = math.floor(math.log2(amax)) - p.largest_exponent
                if form.scale == "rceil":
                    k = math.ceil(math.log2(amax / p.largest))
            scale = 2.0 ** max(-127, min(127, k))
            out[row, start : start + 32] = (p.quantize(block / scale) * scale).float()
    return out


@pytest.mark.parametrize("rule", ["floor", "rceil"])
@pytest.mark.parametrize("form", FORMS)
def test_mx_is_the_specification_word_by_word(form: str, rule: Any) -> None:
    """Fails on a wrong emax, a scale from the wrong axis, or a tail block that is left out."""
    x = normal(6, 80)
    x[0, :32] = 0.0
    assert torch.equal(MX(form, scale=rule).quantize(x), by_hand(x, MX(form, scale=rule)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_powers_of_two_pass_through(form: str, rule: Any) -> None:
    """x -> 2^k x scales the result exactly. Fails on a scale that is not exact, or arithmetic that underflows."""
    x, mx = normal(3, 64), MX(form, scale=rule)
    for k in (-60, -7, 40):
        assert torch.equal(mx.quantize(x * 2.0**k), mx.quantize(x) * 2.0**k)


@pytest.mark.parametrize("form", FORMS)
def test_the_order_within_a_block_does_not_matter(form: str) -> None:
    """Fails when a scale is taken from a part of the block."""
    x = normal(2, 32)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(MX(form).quantize(x[:, order]), MX(form).quantize(x)[:, order])


@pytest.mark.parametrize("form", FORMS)
def test_rceil_cuts_nothing_and_floor_cuts_what_it_must(form: str) -> None:
    """Fails when rceil is computed by a logarithm that rounds down just above a power of two."""
    p = element(form).largest if form != "int8" else 127 / 64
    amax = torch.tensor([p, math.nextafter(p, math.inf) * (1 + 1e-6), 1.5 * p])
    x = (amax[:, None] * torch.linspace(-1, 1, 32)).float()
    for k in (-20, 0, 30):
        rceil = MX(form, scale="rceil")
        assert bool((x * 2.0**k <= rceil.limit(x * 2.0**k)).all())
    assert bool((x[1:] > MX(form, scale="floor").limit(x[1:])).any())


@pytest.mark.parametrize("form", ["e4m3", "e5m2", "e2m1", "e3m2", "e2m3"])
@pytest.mark.parametrize("rule", RULES)
def test_the_two_ways_to_the_exponent_agree(form: str, rule: Any) -> None:
    """The bit patterns of float32 and frexp of float64, also for subnormals. Fails on a carry that is one off."""
    draws = torch.randint(0, 0x7F800000, (50_000,), generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, 1e-45, 448.0, 448.00003, 6.0, 6.0000005, 1.9375, 1.9374999, 2.0**127])
    amax = torch.cat([draws.int().view(torch.float32), special])
    assert torch.equal(
        shared_exponents(amax, element(form), rule), shared_exponents(amax.double(), element(form), rule)
    )


def test_not_finite_values_poison_their_block_and_no_other() -> None:
    """Fails on 0/0, on a NaN that becomes the largest value, and on one that spreads over the tensor."""
    x = normal(2, 96)
    x[0, 5], x[1, 70] = math.nan, math.inf
    got = MX("e4m3").quantize(x)
    assert bool(got[0, :32].isnan().all())
    assert bool(got[1, 64:].isnan().all())
    assert int(got.isnan().sum()) == 64
    _, (scales,) = MX("e4m3").encode(x)
    assert scales.squeeze(-1)[0, 0].item() == 255
    assert torch.equal(MX("e4m3").decode(MX("e4m3").encode(x)).isnan(), got.isnan())
    assert bool(Scaled("e4m3", 32).quantize(x)[0, :32].isnan().all())


@pytest.mark.parametrize("name", [name for name in NAMED if name not in ("float8_e8m0fnu",)])
def test_zero_and_subnormal_tensors_give_no_nan(name: str) -> None:
    """The NaN of amax = 0 that torchao's users met. Fails on 0/0 and on a scale that underflows to 0."""
    form = NAMED[name]
    for x in (torch.zeros(4, 64), torch.full((4, 64), 1e-44)):
        assert bool(torch.isfinite(form.quantize(x)).all())
    if not name.startswith(("dorefa", "binary")):
        assert bool((form.quantize(torch.zeros(4, 64)) == 0).all())


@pytest.mark.parametrize(
    "form",
    [
        MX("e4m3"),
        MX("e2m1", block=(32, 32)),
        NVFP4(),
        Scaled("int8", "row"),
        Scaled("e4m3", (8, 16)),
        BlockFloat(8),
        Affine(8, 32),
    ],
    ids=str,
)
def test_codes_and_scales_say_exactly_what_quantize_says(form: Format) -> None:
    """Fails when storage and emulation part: a scale that is rounded in one of them only."""
    x = normal(64, 96)
    for axis in (-1, 0):
        assert torch.equal(form.decode(form.encode(x, axis=axis), axis=axis), form.quantize(x, axis=axis))


def test_an_axis_is_the_transposed_one() -> None:
    """Fails on a block along the wrong axis."""
    x = normal(64, 96)
    for form in (MX("e4m3"), NVFP4(), Scaled("int8", "row"), Scaled("e4m3", 16), BlockFloat(8, 32)):
        assert torch.equal(form.quantize(x, axis=0), form.quantize(x.T.contiguous()).T)


def test_square_tiles_serve_both_products() -> None:
    """A 32 x 32 tile is the same whichever axis is summed over, a block is not. Fails on tiles that follow the axis."""
    x = normal(64, 64)
    tile = Scaled("int8", (32, 32))
    assert torch.equal(tile.quantize(x), tile.quantize(x, axis=0))
    assert not tile.needs_axis
    assert MX("e4m3").needs_axis
    assert not torch.equal(MX("e4m3").quantize(x), MX("e4m3").quantize(x, axis=0))


def test_a_tail_is_padded_with_zeros_and_storage_asks_first() -> None:
    """Fails when the last, shorter block takes a neighbour's scale, or codes are shorter than their blocks unasked."""
    x = normal(3, 70)
    got = MX("e4m3").quantize(x)
    assert got.shape == x.shape
    assert torch.equal(got[:, 64:], MX("e4m3").quantize(x[:, 64:]))
    with pytest.raises(ValueError, match=r"stores blocks of 32, and axis -1 has 70 entries.*pad=True for 26 zeros"):
        MX("e4m3").encode(x)
    codes, _ = MX("e4m3").encode(x, pad=True)
    assert codes.shape == (3, 96)


def test_integers_are_exact_where_they_can_be() -> None:
    """A constant tensor; a tensor of one row; the largest magnitude. Fails on a scale that is off by a rounding."""
    constant = torch.full((4, 8), 0.3)
    assert torch.equal(Scaled("int8").quantize(constant), constant)
    row = normal(1, 64)
    assert torch.equal(Scaled("int8", "row").quantize(row), Scaled("int8").quantize(row))
    x = normal(4, 64).double()
    worst = (Scaled("int8").quantize(x) - x).abs().max()
    assert worst <= x.abs().max() / 127 / 2 * (1 + 1e-12)


def test_nvfp4_is_exact_on_what_it_can_hold() -> None:
    """Multiples of +-{0, .5, 1, 1.5, 2, 3, 4, 6} with E4M3 scales. Fails on a scale that is rounded twice."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    block = torch.cat([values, -values])
    scales = torch.tensor([448.0, 16.0, 1.0, 0.875])
    x = scales[:, None] * block
    assert torch.equal(NVFP4().quantize(x), x)


def test_nvfp4_small_blocks_by_the_rule_that_is_given() -> None:
    """A block 2^14 below the tensor's amax. Fails when its scale is zero and the values are divided by it."""
    x = torch.cat([torch.full((1, 16), 2688.0), torch.full((1, 16), 0.004)])
    vanished, kept = NVFP4().quantize(x)[1], NVFP4(scale_min="normal").quantize(x)[1]
    assert bool((vanished == 0).all())
    assert bool(torch.isfinite(kept).all())


def test_block_float_and_flexpoint() -> None:
    """BlockFloat(8, 32) is MXINT8; Flexpoint's step is that of the largest value. Fails on a mantissa a bit short."""
    x = normal(2, 64)
    assert torch.equal(BlockFloat(8, 32).quantize(x), MX("int8").quantize(x))
    x = torch.tensor([1.9, 1e-4])
    assert torch.equal(BlockFloat(16, "tensor").quantize(x), (x * 2**14).round() / 2**14)


def test_bits_count_the_scales() -> None:
    """Fails on a table that calls MXFP4 a format of 4 bits."""
    assert (MX("e2m1").bits, NVFP4().bits, Scaled("int8", (32, 32)).bits) == (4.25, 4.5, 8.03125)
    assert Scaled(dynamic_tree(8), 256).bits == 8.125
