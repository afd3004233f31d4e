"""The quantizer of `hestia` against the definition, finite differences, and its limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regularized.compression.hestia import (
    anneal,
    from_codes,
    group_scales,
    optimal_temperature,
    quantize_weight,
    soft_levels,
    to_codes,
)
from regularized.compression.hestia.quantizer import CODEBOOKS, levels_of

TERNARY = CODEBOOKS["ternary"]
UNEVEN = (-2.0, -0.3, 0.1, 1.5, 4.0)


def weights(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_definition(z, levels, temperature):
    """The softmax over a dimension of levels, as the paper writes it."""
    c = torch.tensor(levels, dtype=z.dtype)
    p = torch.softmax(-((z[..., None] - c) ** 2) / temperature, dim=-1)
    return (p * c).sum(-1)


@pytest.mark.parametrize("codebook", ["binary", "ternary", "quaternary", UNEVEN])
@pytest.mark.parametrize("temperature", [0.02, 0.35, 1.4, 1.5, 20.0])
def test_soft_value_is_the_softmax_mean(codebook, temperature):
    """Fails when the staircase of sigmoids is not the softmax: on both sides of where its roots turn complex."""
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    expected = by_definition(z, levels_of(codebook), temperature)
    torch.testing.assert_close(soft_levels(z, temperature, codebook=codebook), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.02, 0.35])
def test_ternary_value_is_the_hyperbolic_form(temperature):
    """Fails for another constant in the paper's closed form ``sinh(2z/t) / (cosh(2z/t) + exp(1/t)/2)``."""
    z = torch.linspace(-3, 3, 801, dtype=torch.float64)
    x = 2 * z / temperature
    expected = torch.sinh(x) / (torch.cosh(x) + 0.5 * math.exp(1 / temperature))
    torch.testing.assert_close(soft_levels(z, temperature), expected, rtol=1e-5, atol=1e-13)


@given(st.floats(1e-4, 50.0), st.sampled_from(["binary", "ternary", "quaternary"]))
@settings(max_examples=60, deadline=None)
def test_soft_value_is_odd_rises_and_stays_inside(temperature, codebook):
    """Fails for an overflow at small temperatures, an uneven staircase, or values beyond the outermost levels."""
    z = torch.linspace(0, 8, 500, dtype=torch.float64)
    value = soft_levels(z, temperature, codebook=codebook)
    torch.testing.assert_close(value, -soft_levels(-z, temperature, codebook=codebook), rtol=0, atol=1e-9)
    assert bool((value.diff() >= -1e-12).all())
    assert bool((value <= levels_of(codebook)[-1]).all())


def test_limits_of_the_temperature():
    """Fails when cold is not the hard quantizer off the middles, half way on them, or hot is not 0."""
    z = torch.tensor([-1.7, -0.51, -0.5, -0.49, 0.0, 0.49, 0.5, 0.51, 1.7], dtype=torch.float64)
    expected = torch.tensor([-1, -1, -0.5, 0, 0, 0, 0.5, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(soft_levels(z, 1e-4), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(soft_levels(z, 1e-4, codebook=(*TERNARY, 9.0)), expected, rtol=0, atol=1e-9)
    assert float(soft_levels(z, 1e6).abs().max()) < 1e-5
    assert soft_levels(z, 0.0).tolist() == [-1, -1, 0, 0, 0, 0, 0, 1, 1]
    assert soft_levels(z, 0.0, codebook=(*TERNARY, 9.0)).tolist() == [-1, -1, 0, 0, 0, 0, 0, 1, 1]  # half way: inwards


@pytest.mark.parametrize("codebook", ["binary", "ternary", "quaternary", UNEVEN])
@pytest.mark.parametrize("group_size", [0, -1, 4])
@pytest.mark.parametrize("pressure", [1.0, 0.3])
def test_gradient_through_value_scale_and_pressure(codebook, group_size, pressure):
    """Fails when the backward pass forgets the scale, the pressure, or mixes groups."""
    w = weights(3, 8, seed=1).requires_grad_()

    def function(w):
        return anneal(w, temperature=0.3, pressure=pressure, codebook=codebook, group_size=group_size)

    assert torch.autograd.gradcheck(function, w)


@pytest.mark.parametrize("group_size", [0, -1, 8])
def test_half_precision_is_computed_wide(group_size):
    """Fails when z or the scale is rounded to bfloat16 before the levels, or gradients come in another type."""
    w = weights(4, 16, dtype=torch.float32).bfloat16()
    low, high = w.clone().requires_grad_(), w.float().requires_grad_()
    out = [anneal(v, temperature=0.05, group_size=group_size) for v in (low, high)]
    for o in out:
        o.square().sum().backward()
    assert out[0].dtype == low.grad.dtype == torch.bfloat16
    assert torch.equal(out[0].float(), out[1].bfloat16().float())
    torch.testing.assert_close(low.grad.float(), high.grad, rtol=2e-2, atol=2e-2)


def test_group_modes_agree():
    """Fails when -1 is not a block as long as a row, or 0 not one block of everything."""
    w = weights(4, 12)
    rows, all_of_it = anneal(w, temperature=0.3, group_size=-1), anneal(w, temperature=0.3, group_size=0)
    assert torch.equal(rows, anneal(w, temperature=0.3, group_size=12))
    flat = anneal(w.reshape(1, -1), temperature=0.3, group_size=48)
    torch.testing.assert_close(all_of_it, flat.reshape(4, 12), rtol=1e-14, atol=1e-14)
    assert group_scales(w, group_size=4).shape == (12, 1)


def test_no_pressure_is_the_weight_itself():
    """Fails when pressure 0 copies the weight: plain training must stay plain to the last bit."""
    w = weights(2, 4).requires_grad_()
    assert anneal(w, temperature=0.3, pressure=0.0, group_size=-1) is w


def test_straight_through_gradients():
    """Fails when the identity carries the scale's gradient, or the code's version does not."""
    w = weights(1, 6, seed=2).requires_grad_()
    grad = weights(1, 6, seed=3)
    (plain,) = torch.autograd.grad(anneal(w, temperature=0.0, group_size=-1), w, grad)
    assert torch.equal(plain, grad)
    hard = anneal(w, temperature=0.0, group_size=-1, straight_through="with_scale")
    (with_scale,) = torch.autograd.grad(hard, w, grad)
    levels = (w / w.abs().mean()).round().clamp(-1, 1)
    expected = grad + torch.sign(w) / 6 * (grad * levels).sum()
    torch.testing.assert_close(with_scale, expected.detach())


def test_tiny_weights_have_the_smallest_scale():
    """Fails when a group of zeros divides by zero, or its scale still gets a gradient where it is held."""
    w = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    out = anneal(w, temperature=0.3, group_size=-1)
    out.sum().backward()
    assert torch.equal(out, torch.zeros_like(out))
    assert bool(w.grad.isfinite().all())
    assert float(group_scales(w, group_size=-1)) == 1e-5


@pytest.mark.parametrize("codebook", ["binary", "ternary", "quaternary", UNEVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_codes_decode_to_the_hard_weight(codebook, dtype):
    """Fails when export and evaluation round in two ways: they must agree to the last bit."""
    w = weights(6, 32).to(dtype)
    codes, scales = to_codes(w, codebook=codebook, group_size=16)
    decoded = from_codes(codes, scales, codebook=codebook, dtype=dtype)
    hard = quantize_weight(w, codebook=codebook, group_size=16)
    assert decoded.dtype == hard.dtype == dtype
    assert torch.equal(decoded.view(torch.uint8), hard.view(torch.uint8))  # 0.0 and -0.0 differ here


def test_hard_weights_have_the_levels_of_their_group():
    """Fails when two groups share a scale, or a level is none of the codebook's."""
    w = weights(2, 12)
    hard = quantize_weight(w, group_size=6).reshape(-1, 6)
    for group, scale in zip(hard, group_scales(w, group_size=6), strict=True):
        assert set(group.tolist()) <= {-float(scale), 0.0, float(scale)}


def test_quantizing_twice_is_not_quantizing_once():
    """Documents why hard weights must not be quantized again: zeros make the scale smaller."""
    hard = quantize_weight(weights(1, 256), group_size=-1)
    again = quantize_weight(hard, group_size=-1)
    assert float(again.abs().max()) < 0.9 * float(hard.abs().max())


def test_optimal_temperature_is_the_official_one():
    """Fails for another distribution than N(0, pi / 2), whose mean absolute value is 1, or another range."""
    assert optimal_temperature() == pytest.approx(0.350885560, abs=1e-6)
    assert optimal_temperature(low=0.5, high=2.0) == pytest.approx(0.5, abs=1e-6)  # at the end of the range


def test_not_finite_weights_stay_visible():
    """Fails when NaN becomes a silent zero or a level."""
    w = weights(2, 4)
    w[0, 1] = math.nan
    for codebook in ("ternary", UNEVEN):
        for temperature in (0.0, 0.3):
            out = anneal(w, temperature=temperature, codebook=codebook, group_size=-1)
            assert bool(out[0].isnan().all())
            assert bool(out[1].isfinite().all())
        assert math.isnan(soft_levels(torch.tensor(math.nan), 0.0, codebook=codebook))
