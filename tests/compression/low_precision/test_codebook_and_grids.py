"""Codebooks (posits, logarithmic numbers, optimizer states) and grids that follow the tensor."""

import math

import numpy as np
import pytest
import torch

from regularized.compression.low_precision.blocks import Scaled
from regularized.compression.low_precision.codebook import (
    Codebook,
    dynamic_tree,
    evenly_above_zero,
    float_sd,
    logarithmic,
    posit,
    powers_of_two,
)
from regularized.compression.low_precision.elements import element
from regularized.compression.low_precision.grids import (
    Affine,
    Binary,
    DoReFa,
    DynamicFixedPoint,
    FallBack,
    ShiftedSqueezed,
    Ternary,
)

BOOKS = [posit(8, 1), posit(6, 0), logarithmic(6, 1), float_sd(), powers_of_two(4), dynamic_tree(), evenly_above_zero()]


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_nearest_is_the_nearest_and_ties_go_to_even_codes(book: Codebook) -> None:
    """Against a search through all numbers. Fails on ties down, and on a midpoint that float32 rounds up."""
    numbers = np.array(book.numbers)
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    draws = torch.randn(500, generator=torch.Generator().manual_seed(0)).numpy()
    x = np.concatenate(
        [middles, np.nextafter(middles, np.float32(9e9)), np.nextafter(middles, np.float32(-9e9)), draws]
    )
    distance = np.abs(x[:, None].astype(np.float64) - numbers)
    best = distance.min(axis=1, keepdims=True)
    candidates = [np.flatnonzero(row) for row in distance == best]
    expected = [int(c[c % 2 == 0][0]) if len(c) == 2 else int(c[0]) for c in candidates]
    assert book.encode(torch.from_numpy(x)).codes.int().tolist() == expected


def test_codebook_of_a_float_format_is_that_format() -> None:
    """The generic way and the bit patterns agree, for all roundings. Fails where either is wrong."""
    form = element("e2m3")
    values = form.values(torch.arange(64)).double().unique().tolist()
    book = Codebook("e2m3", tuple(values))
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3
    for rounding in ("nearest_even", "toward_zero"):
        assert torch.equal(book.quantize(x, rounding=rounding), form.quantize(x, rounding=rounding))
    drawn = book.quantize(
        torch.full((50_000,), 1.05), rounding="stochastic", generator=torch.Generator().manual_seed(0)
    )
    assert drawn.unique().tolist() == [1.0, 1.125]
    assert abs(drawn.double().mean().item() - 1.05) < 4 * 0.125 * math.sqrt(0.24 / 50_000)


def test_posits_are_those_of_the_standard() -> None:
    """Published values of posit<8,0> and posit<8,2>. Fails on a run length that is one off."""
    assert posit(8, 0).largest == 64.0
    assert min(n for n in posit(8, 0).numbers if n > 0) == 1 / 64
    assert posit(8, 2).largest == 2.0**24
    positive = [n for n in posit(4, 0).numbers if n > 0]
    assert positive == [0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0]
    assert sum(0.5 <= n < 1 for n in posit(8, 0).numbers) == 32
    assert all(-n in posit(8, 1).numbers for n in posit(8, 1).numbers)


def test_the_codes_of_optimizers_are_those_of_bitsandbytes() -> None:
    """Counts and values that anyone can work out by hand. Fails on decades that are shifted by one."""
    signed, unsigned = dynamic_tree(), dynamic_tree(signed=False)
    assert len(signed.numbers) == len(unsigned.numbers) == 256
    assert signed.numbers[-1] == unsigned.numbers[-1] == 1.0
    assert min(n for n in signed.numbers if n > 0) == pytest.approx(0.55e-6)
    assert min(n for n in unsigned.numbers if n > 0) == pytest.approx(0.325e-6)
    assert 0.0 in signed.numbers
    assert 0.0 not in evenly_above_zero().numbers


def test_what_is_outside_is_cut_and_nan_stays() -> None:
    """Fails on an index beyond the table."""
    for rounding in ("nearest_even", "toward_zero", "stochastic"):
        got = powers_of_two(3).quantize(torch.tensor([9.0, -9.0, math.nan]), rounding=rounding)  # type: ignore[arg-type]
        assert got[:2].tolist() == [1.0, -1.0]
        assert bool(got[2].isnan())


def test_affine_holds_zero_exactly() -> None:
    """Padding and ReLU need it. Fails on a zero point that is not rounded."""
    x = torch.tensor([0.3, 1.7, 0.0, -0.11])
    form = Affine(4)
    assert form.quantize(x)[2].item() == 0.0
    assert torch.equal(form.decode(form.encode(x)), form.quantize(x))
    assert bool(((form.quantize(x) - x).abs() <= (1.7 + 0.11) / 15).all())
    assert torch.equal(Affine(8).quantize(torch.zeros(3)), torch.zeros(3))


def test_dynamic_fixed_point_comes_to_rest_where_the_controller_does() -> None:
    """Step by step as Courbariaux has it. Fails on a range that is a power of two too wide."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 0.37
    for rate in (0.0, 0.001, 0.02):
        fraction = 20
        for _ in range(60):  # the controller
            largest = 127 * 2.0**-fraction
            if (x.abs() > largest).double().mean() > rate:
                fraction -= 1
            elif (x.abs() > largest / 2).double().mean() <= rate:
                fraction += 1
        expected = (x * 2.0**fraction).round().clamp(-127, 127) * 2.0**-fraction
        assert torch.equal(DynamicFixedPoint(8, rate).quantize(x), expected)


def test_ternary_binary_and_dorefa_by_their_formulas() -> None:
    """Fails on max in place of mean, and on a sign of zero that is zero."""
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    gamma = w.abs().mean()
    assert torch.equal(Ternary().quantize(w), (w / (gamma + 1e-5)).round().clamp(-1, 1) * gamma)
    assert torch.equal(Binary("row").quantize(w).abs(), w.abs().mean(1, keepdim=True).expand_as(w))
    assert Binary().quantize(torch.tensor([0.0, 2.0])).tolist() == [1.0, 1.0]
    r = torch.tanh(w) / (2 * torch.tanh(w).abs().max()) + 0.5
    assert torch.equal(DoReFa(3).quantize(w), 2 * (torch.round(7 * r) / 7) - 1)


def test_shifted_and_squeezed_keeps_what_e5m2_loses() -> None:
    """Small numbers of a narrow range. Fails when the shift is not undone."""
    x = torch.exp(torch.randn(1000, generator=torch.Generator().manual_seed(0))) * 1e-12
    assert bool((element("e5m2").quantize(x) == 0).all())
    got = ShiftedSqueezed().quantize(x)
    assert float(((got - x).abs() / x).median()) < 0.03
    assert torch.equal(got.sign(), x.sign())


def test_fall_back_spends_twice_the_bits_where_outliers_are() -> None:
    """Fails when the residue of a block is not added, or of every block."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:32, :32] *= 100.0
    once, twice = Scaled("int8", (32, 32)).quantize(x), FallBack().quantize(x)
    assert torch.equal(once[32:], twice[32:])
    assert float((twice - x)[:32, :32].abs().max()) < 0.01 * float((once - x)[:32, :32].abs().max())
