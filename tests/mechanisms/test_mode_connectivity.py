"""The loss between networks."""

import copy

import pytest
import torch
from torch import nn

from regularized.mechanisms.mode_connectivity import WeightPlane, barrier, errors_between, mixed_weights


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def test_ends_are_the_networks_and_neither_is_changed():
    """Fails when the ends are off, the shares run backwards, or a network is overwritten."""
    a, b = network(0), network(1)
    before = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    seen = []
    errors_between(a, b, lambda m: seen.append(copy.deepcopy(m.state_dict())) or 0.0, points=5)
    assert all(torch.equal(seen[0][k], before[0][k]) for k in before[0])
    assert all(torch.equal(seen[-1][k], before[1][k]) for k in before[1])
    torch.testing.assert_close(seen[1]["0.weight"], 0.75 * a[0].weight.detach() + 0.25 * b[0].weight.detach())
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, state[k]) for k, tensor in model.state_dict().items())


def test_a_line_of_a_convex_loss_has_no_barrier_and_a_double_well_has_one():
    """Fails when the barrier's sign is turned, or it is measured from zero."""
    a, b = (nn.Linear(1, 1, bias=False) for _ in range(2))
    a.weight.data.fill_(-1.0)
    b.weight.data.fill_(1.0)
    assert barrier(errors_between(a, b, lambda m: float(m.weight.detach()) ** 2)) < 0
    well = errors_between(a, b, lambda m: (float(m.weight.detach()) ** 2 - 1) ** 2 + 5.0)
    assert barrier(well) == pytest.approx(1.0)
    assert barrier(torch.tensor([0.0, 0.5, 1.0])) == pytest.approx(0.0)  # a slope is none
    assert barrier(torch.tensor([1.0, 3.0, 0.0, 0.0])) == pytest.approx(3 - 2 / 3)


def test_calibration_comes_before_each_evaluation():
    """Fails when mixed statistics of batch normalisation are evaluated."""
    a, b = network(0), network(1)
    x = 3 + torch.randn(64, 3)
    expected = x.mean(0)
    seen = []

    def evaluate(model):
        mean = model[0](x).mean(0)
        seen.append(torch.allclose(model[1].running_mean, mean, atol=1e-5))
        return 0.0

    errors_between(a, b, evaluate, points=4, calibrate=lambda m: torch.optim.swa_utils.update_bn([x], m))
    assert seen == [True] * 4
    assert expected.abs().min() > 1


def test_extrapolation_and_integer_buffers():
    """Fails when counters are interpolated, or shares are clamped."""
    a, b, c = network(0), network(1), network(2)
    a[1].num_batches_tracked.fill_(7)
    mixed_weights(a, b, 1.5, into=c)
    torch.testing.assert_close(c[0].bias, 1.5 * b[0].bias - 0.5 * a[0].bias)
    assert int(c[1].num_batches_tracked) == 7
    with pytest.raises(ValueError, match=r"'1.weight' is in one of them only|'2.weight'|one structure"):
        mixed_weights(a, nn.Sequential(nn.Linear(3, 4)), 0.5, into=c)


def test_the_plane_keeps_distances():
    """Fails when the axes are not orthonormal, or the corners are not where the networks are."""
    networks = [network(seed).double() for seed in range(3)]
    plane = WeightPlane(networks)
    vectors = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in networks]
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close((plane.corners[i] - plane.corners[j]).norm(), (vectors[i] - vectors[j]).norm())
        target = plane.place(network(9).double(), *plane.corners[i].tolist())
        torch.testing.assert_close(nn.utils.parameters_to_vector(target.parameters()), vectors[i])
    torch.testing.assert_close(plane.coordinates(plane.place(network(9).double(), 0.3, -0.2)).tolist(), [0.3, -0.2])
    with pytest.raises(ValueError, match="three networks"):
        WeightPlane(networks[:2])
    with pytest.raises(ValueError, match="one structure"):
        WeightPlane([*networks[:2], nn.Linear(2, 2)])
