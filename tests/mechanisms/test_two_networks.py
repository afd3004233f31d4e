"""What procedures of two networks share."""

import pytest
import torch
from torch import nn

from regularized.mechanisms.two_networks import check_distinct, evaluating, mean_logits


def test_distinct_networks():
    """Fails when one network, or two with a tied layer deep inside, pass for two."""
    a, b = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    check_distinct([a, b], remedy="do this")
    with pytest.raises(ValueError, match="same network twice; do this"):
        check_distinct([a, a], remedy="do this")
    b[0].bias = a[0].bias
    with pytest.raises(ValueError, match=r"share parameters: '0\.bias'.*'0\.bias'.*; do this"):
        check_distinct([a, b], remedy="do this")


def test_one_network_may_tie_its_own_layers():
    """Fails when weights that one network shares within itself are taken for shared between networks."""
    a, b = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    a[1].weight = a[0].weight
    check_distinct([a, b], remedy="")


def test_modes_come_back_after_an_error_too():
    """Fails when a frozen part is switched to training, or an exception leaves everything in evaluation mode."""
    model = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Sequential(nn.Dropout(), nn.Dropout().eval()))
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ValueError, match="expected 2D"), evaluating(model):
        model(torch.zeros(2))
    assert [m.training for m in model.modules()] == before


def test_mean_logits():
    """Fails when a network predicts in training mode, or records a graph."""
    pair = [nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(2)]
    x = torch.randn(5, 4)
    ours = mean_logits(pair, x)
    assert not ours.requires_grad
    torch.testing.assert_close(ours, (pair[0][1](x) + pair[1][1](x)) / 2)
