"""The regulariser: closed forms, gradients, limits; thresholds and rates."""

import math

import pytest
import torch
from torch.nn import functional as F

from regularized.continual.ovor import EnergyQuantile, energy, energy_gap, epoch_cosine, outlier_loss
from regularized.continual.ovor.loss import task_cross_entropy
from regularized.training.progress import Progress


def logits(rows, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


def test_one_class_in_closed_form():
    """Fails on the sign of the energy, on hinges turned round, and on a Huber loss without its half."""
    real, outlier = torch.tensor([[4.0], [9.5]]), torch.tensor([[6.0], [-20.0]])
    # Energies -4 and -9.5 against -10: 6 and 0.5 too high. -6 and 20 against -3: 3 too low, and fine.
    expected = (5.5 + 0.125) / 2 + (2.5 + 0.0) / 2
    assert outlier_loss(real, outlier, tau_id=-10.0, tau_ood=-3.0).item() == pytest.approx(expected)


@pytest.mark.parametrize("huber", [True, False])
def test_gradient_by_hand(huber):
    """``-softmax rho'(u) / B`` for real features, plus for outliers. Fails on a sum for the mean, or a missing term."""
    real, outlier = logits(6).requires_grad_(), logits(4, seed=1).requires_grad_()
    loss = outlier_loss(real, outlier, tau_id=-7.0, tau_ood=-2.0, huber=huber)
    found = torch.autograd.grad(loss, (real, outlier))
    for z, gradient, sign, tau in ((real, found[0], 1.0, -7.0), (outlier, found[1], -1.0, -2.0)):
        u = (sign * (-z.logsumexp(1) - tau)).clamp_min(0.0)
        slope = u.clamp_max(1.0) if huber else 2.0 * u
        expected = -sign * z.softmax(1) * slope[:, None] / len(z)
        torch.testing.assert_close(gradient, expected.detach(), rtol=0, atol=1e-12)
    assert all(bool(g.abs().max() > 0) for g in found)


def test_nothing_where_all_are_where_they_belong():
    """Exactly 0, with no gradient. Fails on a loss that goes on pushing, as a cross-entropy would."""
    real, outlier = (logits(4) + 40.0).requires_grad_(), (logits(4) - 40.0).requires_grad_()
    loss = outlier_loss(real, outlier, tau_id=-15.0, tau_ood=-3.0)
    gradients = torch.autograd.grad(loss, (real, outlier))
    assert loss.item() == 0.0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_huber_is_half_the_square_near_the_thresholds():
    """Fails when one of the two has the other's factor."""
    real, outlier = torch.tensor([[10.0], [10.5]]), torch.tensor([[3.2], [3.9]])  # 0.5 and 0; 0.2 and 0.9
    huber, square = (outlier_loss(real, outlier, tau_id=-10.5, tau_ood=-3.0, huber=h) for h in (True, False))
    torch.testing.assert_close(2.0 * huber, square)


def test_masked_columns_take_no_part():
    """Fails when the energy counts classes of other tasks: minus infinity and a slice must say the same."""
    z = logits(3)
    masked = z.clone()
    masked[:, :2] = -torch.inf
    torch.testing.assert_close(energy(masked), energy(z[:, 2:]))


def test_task_cross_entropy_is_that_of_masked_logits():
    """Fails when columns are taken for positions, or old columns get a gradient."""
    z = logits(6).requires_grad_()
    columns = [4, 1]
    places = torch.tensor([0, 1, 0, 1, 1, 0])
    loss = task_cross_entropy(z, places, columns)
    masked = torch.full_like(z, -torch.inf)
    masked[:, columns] = z.detach()[:, columns]
    expected = F.cross_entropy(masked, torch.tensor(columns)[places], reduction="none")
    torch.testing.assert_close(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert torch.equal(gradient[:, [0, 2, 3]], torch.zeros(6, 3, dtype=z.dtype))


def test_energy_gap_is_positive_where_outliers_are_above():
    """Fails on the reversed sign."""
    assert energy_gap(torch.tensor([[5.0]]), torch.tensor([[1.0]])).item() == 4.0


def test_thresholds_move_with_the_logits():
    """Fails when a quantile of the logits, or its other end, stands for one of the energies."""
    energies = torch.arange(-100.0, 1.0)
    low = EnergyQuantile(quantile=0.1, margin=5.0).of(energies)
    assert low == (-90.0, -85.0)
    assert EnergyQuantile(quantile=0.1, margin=5.0).of(energies - 7.0) == (-97.0, -92.0)


def test_rates_lag_by_an_epoch_as_in_the_released_code():
    """Fails on the formula where the code is meant, on E for E - 1, and when the second phase begins anew."""
    lagged, exact, second = epoch_cosine(20), epoch_cosine(20, lag=0), epoch_cosine(20, start=16)
    at = [Progress(0, 1, epoch, 20) for epoch in range(20)]
    assert [lagged(p) for p in at] == [1.0, *(exact(p) for p in at[:-1])]
    assert exact(at[-1]) == pytest.approx(math.cos(0.99 * math.pi / 2))
    assert [second(p) for p in at[:4]] == [lagged(p) for p in at[16:]]
