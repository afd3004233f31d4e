"""RF8: the rounding against logarithms, the table of values, and the byte."""

import math

import pytest
import torch

from regularized.compression.generalized_gaussian import PackedRF8, rf8
from regularized.compression.generalized_gaussian.rf8 import MANTISSAS


def by_logarithm(w, limit=4):
    """The authors' rule as they write it."""
    size = w.abs()
    e1 = torch.round(torch.log2(size))
    residual = size - 2**e1
    e2 = torch.round(torch.log2(residual.abs()))
    value = torch.where(e1 - e2 <= limit, 2**e1 + residual.sign() * 2**e2, 2**e1)
    return value * w.sign()


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 6])
def test_against_logarithms(limit):
    """Fails when a bound lies elsewhere than where the logarithm's rounding has it."""
    w = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(rf8(w, limit=limit), by_logarithm(w, limit))


@pytest.mark.parametrize("limit", range(5))
def test_number_of_values(limit):
    """Fails when a binade has others than 1, 2, 3, 5 and 7 values, or a larger limit has not those of a smaller one."""
    w = torch.linspace(1.0, 2.0, 20_001, dtype=torch.float64)[:-1]
    values = set(rf8(w, limit=limit).tolist()) - {2.0}
    assert len(values) == (1, 2, 3, 5, 7)[limit]
    if limit:
        assert set(rf8(w, limit=limit - 1).tolist()) <= values | {2.0}


def test_values_and_bounds_of_the_table():
    """Fails when the table of the docstring says something else than the code does."""
    for value in MANTISSAS:
        assert rf8(torch.tensor(value, dtype=torch.float64)) == value
    root = math.sqrt(2)
    bounds = [*(1 + root * 2.0**-k for k in (5, 4, 3, 2)), *(2 - root * 2.0**-k for k in (2, 3, 4))]
    for below, bound, above in zip(MANTISSAS, bounds, [*MANTISSAS[1:], 2.0], strict=True):
        near = torch.tensor([bound - 1e-12, bound + 1e-12], dtype=torch.float64)
        assert rf8(near).tolist() == [below, above]


def test_error_and_symmetry():
    """Fails when the error is above 0.1082, rounding is not odd or not idempotent, or powers of two or zero move."""
    w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    rounded = rf8(w)
    assert float(((rounded - w) / w).abs().max()) < 0.1083
    assert torch.equal(rf8(rounded), rounded)
    assert torch.equal(rf8(-w), -rounded)
    powers = 2.0 ** torch.arange(-60, 60)
    assert torch.equal(rf8(powers), powers)
    assert rf8(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_float32_at_the_edge():
    """Fails when a bound is compared in float32: these two neighbours of sqrt(1/2) lie on its two sides."""
    above = torch.tensor(math.sqrt(0.5), dtype=torch.float32)  # rounded down
    exact = by_logarithm(torch.stack([above, torch.nextafter(above, torch.tensor(1.0))]).double(), 0)
    assert rf8(torch.stack([above, torch.nextafter(above, torch.tensor(1.0))]), limit=0).tolist() == exact.tolist()
    assert exact.tolist() == [0.5, 1.0]


def test_bytes():
    """Fails when sign, exponent or value stand at other bits, or zero is another byte than 7."""
    packed = PackedRF8.pack(torch.tensor([1.0, 1.5, -1.0, 0.5, 0.0, -0.0, 1.875]))
    assert packed.top == 0
    assert packed.codes.tolist() == [0b0_1111_000, 0b0_1111_100, 0b1_1111_000, 0b0_1110_000, 7, 7, 0b0_1111_110]


def test_packing_is_exact():
    """Fails when what is packed is not what is rounded, within the sixteen binades."""
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    packed = PackedRF8.pack(w)
    inside = (rf8(w).abs() >= 2.0 ** (packed.top - 15)) | (w == 0)
    assert torch.equal(packed.unpack()[inside], rf8(w)[inside])
    assert int((~inside).sum()) == packed.flushed + packed.raised
    assert packed.saturated == 0
    assert packed.unpack(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(packed.unpack(torch.bfloat16).float(), packed.unpack())
    again = PackedRF8.pack(packed.unpack(), top=packed.top)
    assert torch.equal(again.codes, packed.codes)


def test_order_of_bytes():
    """Fails when the bytes of positive weights are not in the order of their values."""
    codes = torch.tensor([c for c in range(128) if c & 7 != 7], dtype=torch.uint8)
    assert bool((PackedRF8(codes, top=0).unpack().diff() > 0).all())


def test_ends_of_the_window():
    """Fails when what is too large or too small is not counted, or goes elsewhere than to the ends or to zero."""
    lowest = 2.0**-15
    packed = PackedRF8.pack(torch.tensor([4.0, -100.0, 1.9, 0.6 * lowest, 0.5 * lowest, -0.2 * lowest]), top=0)
    assert packed.unpack().tolist() == [1.875, -1.875, 1.875, lowest, 0.0, 0.0]
    assert (packed.saturated, packed.raised, packed.flushed) == (2, 1, 2)


def test_zeros_and_nothing():
    """Fails when a tensor of zeros, or an empty one, has no exponent to begin with."""
    assert not PackedRF8.pack(torch.zeros(3)).unpack().any()
    assert PackedRF8.pack(torch.zeros(0, 2)).unpack().shape == (0, 2)
