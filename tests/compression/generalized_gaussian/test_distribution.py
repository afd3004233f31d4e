"""The generalised Gaussian against SciPy's, its fit, and the initialisation."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.stats import gennorm, kstest
from torch import nn

from regularized.compression.generalized_gaussian import (
    GeneralizedGaussian,
    generalized_gaussian_,
    initialize_,
    layer_shapes,
    moment_ratio,
    weight_moments,
)
from regularized.compression.generalized_gaussian.distribution import SHAPES, ratio_table


def drawn(shape, scale=0.05, number=200_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return GeneralizedGaussian(shape, scale).sample((number,), generator=generator, dtype=torch.float64)


def test_ratio():
    """Fails when the ratio that tells the shape is not 2 for Laplace, pi / 2 for Gauss, or does not fall."""
    assert moment_ratio(1.0) == pytest.approx(2.0, rel=1e-12)
    assert moment_ratio(2.0) == pytest.approx(math.pi / 2, rel=1e-12)
    ratios = [moment_ratio(shape) for shape in SHAPES]
    assert len(ratios) == 291
    assert all(a > b for a, b in pairwise(ratios))


@pytest.mark.parametrize("shape", [0.5, 1.0, 1.7, 2.0, 3.0])
def test_moments_against_scipy(shape):
    """Fails for a wrong Gamma function in variance, kurtosis, entropy or density."""
    law, theirs = GeneralizedGaussian(shape, 0.3), gennorm(shape, scale=0.3)
    variance, kurtosis = theirs.stats("vk")
    assert law.variance == pytest.approx(float(variance), rel=1e-10)
    assert law.kurtosis - 3 == pytest.approx(float(kurtosis), rel=1e-8, abs=1e-8)
    assert law.entropy == pytest.approx(float(theirs.entropy()), rel=1e-10)
    w = torch.linspace(-1, 1, 11, dtype=torch.float64)
    assert torch.allclose(law.log_density(w), torch.tensor(theirs.logpdf(w.numpy())))
    assert GeneralizedGaussian.with_variance(shape, law.variance).scale == pytest.approx(0.3)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 3.0])
def test_samples_have_the_distribution(shape):
    """Fails for samples of another law: the power of the Gamma draw inverted, or one sign more frequent."""
    assert kstest(drawn(shape, number=20_000).numpy(), gennorm(shape, scale=0.05).cdf).pvalue > 1e-3


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_fit_finds_the_shape(shape):
    """Fails when the table is read at the wrong place, or the fit depends on the scale."""
    w = drawn(shape, number=1_000_000)
    law = GeneralizedGaussian.fit(w)
    assert law.shape == pytest.approx(shape, abs=0.03)
    assert law.scale == pytest.approx(0.05, rel=0.03)
    assert GeneralizedGaussian.fit(1024 * w).shape == law.shape


def test_fit_pools_tensors():
    """Fails when tensors are averaged rather than their weights pooled, or empty ones are in the way."""
    w = drawn(0.7, number=3000)
    pooled = weight_moments([w])
    for parts in ((w[:10], w[10:]), (w[:1000].view(10, 100), w[1000:], w[:0])):
        split = weight_moments(parts)
        assert split.shape == pooled.shape
        assert torch.allclose(split.ratio, pooled.ratio)


def test_nearest_in_the_ratio():
    """Fails when the shape is interpolated, or the nearest in the shape is taken; and for a tie the first counts."""
    table = torch.tensor([[1.0, 3.0], [1.1, 2.05], [1.2, 1.9], [1.3, 1.8]], dtype=torch.float64)
    assert float(weight_moments([torch.tensor([1.0, 0.0])], table=table).shape) == 1.1  # ratio 2
    tie = torch.tensor([[0.5, 2.5], [0.6, 1.5], [0.7, 1.2]], dtype=torch.float64)
    assert float(weight_moments([torch.tensor([1.0, 0.0])], table=tie).shape) == 0.5


def test_half_precision_is_summed_in_float32():
    """Fails when a sum of half-precision weights saturates or loses its small ones."""
    w = torch.full((100_000,), 3.0, dtype=torch.bfloat16)
    moments = weight_moments([w])
    assert float(moments.std) == pytest.approx(3.0, rel=1e-3)
    assert float(moments.ratio) == pytest.approx(1.0, rel=1e-3)


def test_table_is_on_the_grid():
    """Fails when the table's shapes are not those of the official code."""
    table = ratio_table()
    assert table.shape == (291, 2)
    assert table[90, 0] == 1.0
    assert float(table[90, 1]) == pytest.approx(2.0)


@pytest.mark.parametrize(("fan", "units"), [("in", 200), ("out", 500)])
@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_initial_variance(shape, fan, units):
    """Fails when the variance is not xi over the fan, the fans are exchanged, or the tails are of another shape."""
    w = generalized_gaussian_(
        torch.empty(500, 200, dtype=torch.float64),
        shape=shape,
        xi=1.5,
        fan=fan,
        generator=torch.Generator().manual_seed(0),
    )
    law = GeneralizedGaussian.with_variance(shape, 1.5 / units)
    assert float(w.var()) == pytest.approx(1.5 / units, rel=0.05)
    assert kstest(w.flatten().numpy(), gennorm(shape, scale=law.scale).cdf).pvalue > 1e-3


def test_shape_two_is_kaimings():
    """Fails when shape 2 is not the Gaussian of Kaiming's initialisation over the outputs."""
    ours = generalized_gaussian_(torch.empty(300, 100), shape=2.0, generator=torch.Generator().manual_seed(0))
    theirs = nn.init.kaiming_normal_(torch.empty(300, 100), mode="fan_out", generator=torch.Generator().manual_seed(1))
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.03)
    assert kstest(ours.flatten().numpy(), theirs.flatten().numpy()).pvalue > 1e-3


def test_convolutions_count_their_field():
    """Fails when the receptive field is left out of the fan."""
    w = generalized_gaussian_(torch.empty(64, 32, 3, 3), xi=1.0, fan="in", generator=torch.Generator().manual_seed(0))
    assert float(w.var() * 32 * 9) == pytest.approx(1.0, rel=0.05)


def test_initialize_draws_each_weight_once():
    """Fails when tied weights are drawn twice, biases stay, norms change, or a generator does not repeat them."""

    def model():
        layers = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6))
        layers[2].weight = layers[0].weight
        nn.init.ones_(layers[2].bias)
        return layers

    first, second = model(), model()
    names = initialize_(first, generator=torch.Generator().manual_seed(3))
    initialize_(second, generator=torch.Generator().manual_seed(3))
    assert names == ["0", "3"]
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[3].weight, second[3].weight)
    assert not first[2].bias.any()
    assert bool((first[1].weight == 1).all())
    assert initialize_(model(), exclude=["3"]) == ["0"]


def test_layer_shapes():
    """Fails when layers are mixed, or vectors are looked at."""
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
    generator = torch.Generator().manual_seed(0)
    for layer, shape in zip(model, (0.5, 2.0), strict=True):
        generalized_gaussian_(layer.weight, shape=shape, generator=generator)
    found = layer_shapes(model)
    assert list(found) == ["0.weight", "1.weight"]
    assert found["0.weight"].shape == pytest.approx(0.5, abs=0.05)
    assert found["1.weight"].shape == pytest.approx(2.0, abs=0.1)
