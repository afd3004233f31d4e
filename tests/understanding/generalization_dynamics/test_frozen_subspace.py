"""Which directions of a layer learn: rank, frozen share, and weights that stay where no input reaches them."""

import copy

import pytest
import torch
from torch import nn

from regularized.understanding.generalization_dynamics.report import frozen_drift, frozen_subspace


def pixels(rows: int, dead: int = 3) -> torch.Tensor:
    x = torch.rand(rows, 10, generator=torch.Generator().manual_seed(0))
    x[:, 10 - dead :] = 0.0
    return x


def test_dead_pixels_and_few_samples():
    """Fails when rank is taken of centred inputs, or of the wrong side of the matrix."""
    model = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 2))
    report = frozen_subspace(model, pixels(50).split(20))
    assert report["0"].rank == 7
    assert report["0"].frozen_share == pytest.approx(0.3)
    assert report["0"].rows == 50
    assert report["0"].frozen_basis.shape == (10, 3)
    assert float(report["0"].frozen_basis[:7].abs().max()) < 1e-7
    assert frozen_subspace(model, [pixels(4)])["0"].rank == 4
    assert report["2"].rank == 4


def test_spectrum_is_that_of_all_rows():
    """Fails when batches are averaged with equal weight, or sequences are not flattened."""
    x = torch.randn(7, 5, 6)
    report = frozen_subspace(nn.Linear(6, 2), [(x[:2], "labels"), (x[2:], "labels")])[""]
    rows = x.reshape(-1, 6).double()
    torch.testing.assert_close(report.eigenvalues, torch.linalg.svdvals(rows).square() / len(rows))
    assert report.condition == pytest.approx(float(report.eigenvalues[0] / report.eigenvalues[-1]))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_frozen_directions_stay(decay):
    """Gradient descent leaves the frozen subspace alone, weight decay does not: fails for a wrong basis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 1))
    x = pixels(40)
    report, before = frozen_subspace(model, [x]), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=decay)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
        optimizer.step()
    drift = frozen_drift(report, before, model.state_dict())["0"]
    assert drift < 1e-6 if decay == 0.0 else drift > 1e-2


def test_only_asked_layers():
    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 2))
    assert set(frozen_subspace(model, [pixels(5)], layers=["1"])) == {"1"}
    with pytest.raises(ValueError, match=r"no nn\.Linear layer"):
        frozen_subspace(nn.ReLU(), [pixels(5)])
