"""Formats of single values against ml_dtypes, gfloat and torch's own casts, code by code and midpoint by midpoint."""

import math

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as gf
from torch import Tensor

from regularized.compression.low_precision.elements import FixedPoint, FloatFormat, element
from regularized.compression.low_precision.rounding import RandomStream, Rounder

SMALL = [
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float4_e2m1fn",
    "float8_e8m0fnu",
]
GFLOAT = {
    "float8_e4m3fn": gf.format_info_ocp_e4m3,
    "float8_e5m2": gf.format_info_ocp_e5m2,
    "float6_e2m3fn": gf.format_info_ocp_e2m3,
    "float6_e3m2fn": gf.format_info_ocp_e3m2,
    "float4_e2m1fn": gf.format_info_ocp_e2m1,
    "fp16": gf.format_info_binary16,
    "bf16": gf.format_info_bfloat16,
}
TORCH = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def codes_of(name: str) -> Tensor:
    """Every code."""
    return torch.arange(1 << int(element(name).bits), dtype=torch.int32)


def edges(name: str) -> Tensor:
    """All values, the midpoints of neighbours, and the float32 on both sides of each."""
    values = element(name).values(codes_of(name))
    values = values[torch.isfinite(values)].double().unique()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    below, above = (torch.nextafter(points, torch.tensor(side)) for side in (-math.inf, math.inf))
    return torch.cat([points, below, above, torch.tensor([0.0, -0.0])])


def same(ours: Tensor, theirs: np.ndarray) -> None:
    """Equal in value, sign of zero and NaN."""
    with np.errstate(invalid="ignore"):  # NumPy on NaN of other types
        theirs = np.asarray(theirs, dtype=np.float64)
    np.testing.assert_array_equal(ours.double().numpy(), theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours.numpy())[number], np.signbit(theirs)[number])


@pytest.mark.parametrize("name", SMALL)
def test_every_code_is_what_ml_dtypes_says(name: str) -> None:
    """Fails on a wrong bias, on subnormals scaled as normals, and on a special code that is read as a number."""
    codes = codes_of(name).to(torch.uint8)
    theirs = codes.numpy().view(getattr(ml_dtypes, name)).astype(np.float32)
    same(element(name).values(codes), theirs)


@pytest.mark.parametrize("name", TORCH)
def test_every_code_is_what_torch_says(name: str) -> None:
    """Fails where our tables and the type that torch stores would part."""
    codes = codes_of(name).to(torch.uint8)
    same(element(name).values(codes), codes.view(getattr(torch, name)).float().numpy())


@pytest.mark.parametrize("name", [n for n in GFLOAT if n not in ("fp16", "bf16")])
def test_every_code_is_what_gfloat_says(name: str) -> None:
    """A second reference, which shares no code with ml_dtypes."""
    info = GFLOAT[name]
    theirs = np.array([gfloat.decode_float(info, int(c)).fval for c in codes_of(name)])
    np.testing.assert_array_equal(element(name).values(codes_of(name)).double().numpy(), theirs)


@pytest.mark.parametrize("name", SMALL)
def test_cast_at_every_edge_is_that_of_ml_dtypes(name: str) -> None:
    """Fails on ties to odd or away, on a double rounding, on subnormals flushed, on a lost sign of zero."""
    form = element(name)
    x = edges(name)
    x = x[x.abs() <= form.largest]
    x = x[x > 0] if name == "float8_e8m0fnu" else x
    theirs = x.numpy().astype(getattr(ml_dtypes, name))
    same(form.quantize(x), theirs.astype(np.float32))
    np.testing.assert_array_equal(form.encode(x).codes.numpy(), theirs.view(np.uint8))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float4_e2m1fn"])
def test_cast_in_every_rounding_is_that_of_gfloat(name: str, rounding: str) -> None:
    """Fails on half-away done as floor(x + 1/2), which is wrong below zero, and on truncation toward minus infinity."""
    mode = {
        "nearest_even": gfloat.RoundMode.TiesToEven,
        "nearest_away": gfloat.RoundMode.TiesToAway,
        "toward_zero": gfloat.RoundMode.TowardZero,
    }[rounding]
    x = edges(name)
    theirs = [gfloat.round_float(GFLOAT[name], float(v), rnd=mode, sat=True) for v in x]
    same(element(name).quantize(x, rounding=rounding), np.array(theirs))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision_is_torchs_on_all_codes_and_random_patterns(name: str, dtype: torch.dtype) -> None:
    """Fails on subnormals of float32 and fp16, and on overflow at the tie above the largest value."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    draws = torch.randint(-(1 << 31), (1 << 31) - 1, (1_000_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([every, draws.int().view(torch.float32)])
    same(element(name).quantize(x, overflow="inf"), x.to(dtype).float().numpy())
    finite = every[torch.isfinite(every)]
    assert torch.equal(element(name).encode(finite).codes, finite.to(dtype).view(torch.int16))


@pytest.mark.parametrize(("name", "mantissa"), [("tf32", 10), ("bf16", 7)])
def test_float64_is_rounded_once(name: str, mantissa: int) -> None:
    """Fails when float64 goes through float32: a value just above a midpoint becomes the midpoint, and ties to even."""
    just_above = 1.0 + 2.0 ** -(mantissa + 1) + 2.0**-40
    assert element(name).quantize(torch.tensor([just_above], dtype=torch.float64)).item() == 1.0 + 2.0**-mantissa
    exact = element(name).quantize(torch.tensor([just_above]))  # in float32 it *is* the midpoint
    assert exact.item() == 1.0


def test_overflow_is_by_the_rule_that_is_given_and_by_no_backend() -> None:
    """Fails when a cast is left to torch (E4M3 saturates everything) or to ml_dtypes (NaN above 464)."""
    x = torch.tensor([448.0, 464.0, 464.1, 1e9, math.inf, -math.inf, math.nan])
    e4m3, e5m2 = element("e4m3"), element("e5m2")
    same(e4m3.quantize(x), np.array([448, 448, 448, 448, 448, -448, np.nan]))
    same(e4m3.quantize(x, overflow="nan"), np.array([448, 448] + [np.nan] * 5))
    y = torch.tensor([57344.0, 61439.0, 61440.0, math.inf, math.nan])
    same(e5m2.quantize(y), np.array([57344, 57344, 57344, 57344, np.nan]))
    same(e5m2.quantize(y, overflow="inf"), np.array([57344, 57344, np.inf, np.inf, np.nan]))
    same(element("float8_e4m3fnuz").quantize(x, overflow="nan"), np.full(7, np.nan))
    same(
        element("e8m0").quantize(torch.tensor([2.0**127, 1.6 * 2.0**127]), overflow="nan"), np.array([2.0**127, np.nan])
    )


@pytest.mark.parametrize("name", SMALL)
def test_encoding_is_idempotent_and_monotone(name: str) -> None:
    """Fails on codes of values that are not on the grid, and on an order that the rounding turns round."""
    form = element(name)
    x = torch.logspace(-8, 8, 4001).clamp(max=form.largest)
    once = form.quantize(x)
    assert torch.equal(form.decode(form.encode(x)), once)
    assert torch.equal(form.quantize(once), once)
    assert bool((once.diff() >= 0).all())
    if name not in ("float8_e8m0fnu",):
        assert torch.equal(form.quantize(-x), -once)


def test_negative_zero_is_kept_where_there_is_one() -> None:
    """Fails when the addition that rounds loses the sign of what becomes zero, or fnuz makes a NaN of it."""
    x = torch.tensor([-0.0, -1e-9])
    for name in ("float8_e4m3fn", "float4_e2m1fn", "fp16", "bf16"):
        assert bool(torch.signbit(element(name).quantize(x)[0]))
        assert element(name).encode(x).codes[0].item() != 0
    fnuz = element("float8_e4m3fnuz")
    assert not bool(torch.signbit(fnuz.quantize(x)).any())
    assert fnuz.encode(x).codes.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "bf16", "fp16"])
def test_stochastic_rounding_has_two_outcomes_and_the_right_mean(name: str) -> None:
    """Fails when the probability is not the distance, at the binade's edge and among subnormals too."""
    form = element(name)
    smallest = form.smallest if isinstance(form, FloatFormat) else 0.0
    for value in (1.03, -1.97, 0.3 * smallest, 1.0):
        x = torch.full((100_000,), value)
        drawn = form.quantize(x, rounding="stochastic", generator=torch.Generator().manual_seed(3)).double()
        seen = drawn.unique()
        exact = float(x[0])
        if seen.numel() == 1:
            assert seen.item() == exact  # a point of the grid is fixed
            continue
        low, high = seen.tolist()
        assert seen.numel() == 2
        assert low < exact < high
        share = (exact - low) / (high - low)
        sigma = (high - low) * math.sqrt(share * (1 - share) / len(x))
        assert abs(drawn.mean().item() - exact) < 4 * sigma


def test_draws_are_a_function_of_seed_and_position() -> None:
    """Fails when a run that goes on from a checkpoint would draw something else than the run that went through."""
    x, form = torch.randn(1000), element("e4m3")

    def drawn(stream: RandomStream) -> Tensor:
        return form.rounded(x, Rounder("stochastic", generator=stream.next(x.device)))

    whole = RandomStream(5, key=2)
    first, second = drawn(whole), drawn(whole)
    assert not torch.equal(first, second)
    assert torch.equal(drawn(RandomStream(5, key=2, position=1)), second)
    assert not torch.equal(drawn(RandomStream(5, key=3)), first)


def test_fixed_point_is_twos_complement() -> None:
    """Fails on a symmetric clip where the word has one negative value more, and on negative codes."""
    form = FixedPoint(8, 6)
    x = torch.tensor([5.0, -5.0, 1.0 / 128, 3.0 / 128])
    assert form.quantize(x).tolist() == [127 / 64, -2.0, 0.0, 2 / 64]
    assert form.encode(x).codes.tolist() == [127, 128, 0, 2]
    assert torch.equal(form.decode(form.encode(x)), form.quantize(x))
    assert FixedPoint(8, 6, symmetric=True).quantize(x)[1].item() == -127 / 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_stays_and_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """Fails when a half-precision tensor is rounded in its own arithmetic."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = element("e4m3").quantize(x)
    assert got.dtype == dtype
    assert torch.equal(got.float(), element("e4m3").quantize(x.float()))
