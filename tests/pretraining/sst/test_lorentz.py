"""The hyperbolic layer stays on the hyperboloid, agrees with a second derivation, and takes part in SST."""

import torch

from regularized.pretraining.sst.layer import SpectralLinear
from regularized.pretraining.sst.lorentz import LorentzLinear, lorentz_centroid, lorentz_lift, lorentz_product
from regularized.pretraining.sst.term import SST


def points(n, d, seed=0):
    return lorentz_lift(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_points_stay_points():
    """Fails when a layer or a mean leaves the hyperboloid."""
    layer = LorentzLinear(6, 4, activation=torch.relu).double()
    for out in (points(7, 5), layer(points(7, 5)), lorentz_centroid(points(7, 5), torch.rand(3, 7).double())):
        torch.testing.assert_close(lorentz_product(out, out), -torch.ones(len(out), dtype=torch.float64))
        assert bool((out[:, 0] > 0).all())


def test_against_the_formula():
    """Fails when time and space are mixed up, or time is not 1.1 + scale sigmoid(z_0)."""
    layer = LorentzLinear(4, 3, scale=5.0).double()
    with torch.no_grad():
        layer.linear.weight.normal_()
        layer.linear.bias.normal_()
    for x, y in zip(points(5, 3), layer(points(5, 3)), strict=True):
        z = layer.linear.weight @ x + layer.linear.bias
        time = 1.1 + 5.0 / (1.0 + torch.exp(-z[0]))
        space = z[1:] / z[1:].norm() * torch.sqrt(time**2 - 1.0)
        torch.testing.assert_close(y, torch.cat([time[None], space]))


def test_time_has_no_weight_at_the_start():
    """Fails when the first column of a new layer is drawn like the others."""
    assert not LorentzLinear(5, 4).linear.weight[:, 0].any()


def test_the_centroid_of_copies_is_the_point():
    """Fails when a mean is not brought back to the hyperboloid, or weights are not weights."""
    one, other = points(2, 3)
    both = torch.stack([one, one, other])
    torch.testing.assert_close(lorentz_centroid(both, torch.tensor([[2.0, 1.0, 0.0]]).double())[0], one)


def test_sst_converts_the_linear_part():
    """Fails when the hyperbolic layer computes something else after surgery, or leaves the hyperboloid in training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(LorentzLinear(6, 9), LorentzLinear(9, 4, activation=torch.relu)).double()
    x, before = points(8, 5), model(points(8, 5))
    sst = SST(model, rank=2, steps_per_iteration=2, iterations_per_round=2, warmup_steps=0)
    assert all(isinstance(layer.linear, SpectralLinear) for layer in model)
    torch.testing.assert_close(model(x), before, atol=1e-12, rtol=1e-12)
    optimizer = sst.bind(torch.optim.SGD(model.parameters(), lr=0.05))
    for _ in range(5):
        y = model(x)
        torch.testing.assert_close(lorentz_product(y, y), -torch.ones(8, dtype=torch.float64))
        y[:, 1:].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(x)
    assert not torch.allclose(after, before)
    sst.merge(model)
    assert all(type(layer.linear) is torch.nn.Linear for layer in model)
    torch.testing.assert_close(model(x), after, atol=1e-12, rtol=1e-12)
